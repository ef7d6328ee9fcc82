// Character classes as the package `tokenizers` has them (an older Unicode version): ids must agree with models trained with it,
// whatever the version of the system's Unicode library.
#pragma once

namespace kompakt {

bool reference_is_mark(char32_t c);         // removed by strip_accents
bool reference_is_other(char32_t c);        // removed by clean_text, besides U+0000 and U+FFFD
bool reference_is_punctuation(char32_t c);  // cut off by the BERT pre-tokenizer
char32_t reference_lower_case(char32_t c);  // single characters; U+0130 is the caller's

}  // namespace kompakt
