// Text helpers: errors, nearest match, strict numbers, sizes, units, UTF-8.
#include "core/text.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "core/error.h"
#include "tests/support.h"

namespace kompakt {

TEST_CASE("an Error prints each part on its own line, and only those that are set") {
  CHECK(std::string(Error("broken").what()) == "broken");
  const Error error = Error("unknown key \"foo\"").at("a.yaml:3:5").given("foo").allowed("for, fob").hint("rename it");
  CHECK(std::string(error.what()) == "a.yaml:3:5: unknown key \"foo\"\n  given:   foo\n  allowed: for, fob\n  to do:   rename it");
  CHECK(error.message() == "unknown key \"foo\"");
  CHECK(error.place() == "a.yaml:3:5");
  CHECK(error.code() == ExitCode::user);
  CHECK(Error("full", ExitCode::resource).code() == ExitCode::resource);
}

TEST_CASE("several problems become one Error that lists all; one stays itself") {
  Problems problems;
  CHECK_NOTHROW(problems.throw_if_any("the recipe has mistakes"));
  problems.add(Error("first").at("x:1"));
  CHECK(testing::error_text([&] { problems.throw_if_any("the recipe has mistakes"); }) == "x:1: first");
  problems.add(Error("second").at("x:2"));
  CHECK(testing::error_text([&] { problems.throw_if_any("the recipe has mistakes"); }) == "the recipe has mistakes (2 mistakes)\nx:1: first\nx:2: second");
}

TEST_CASE("the nearest match is a typo away, or nothing") {
  const std::vector<std::string> names = {"weights", "group", "method", "embedding"};
  CHECK(nearest("wieghts", names) == "weights");
  CHECK(nearest("weight", names) == "weights");
  CHECK(nearest("gruop", names) == "group");
  CHECK_FALSE(nearest("temperature", names));
  CHECK_FALSE(nearest("xyz", names));
  CHECK_FALSE(nearest("anything", {}));
  CHECK(did_you_mean("metod", names) == "; did you mean \"method\"?");
  CHECK(did_you_mean("zzz", names).empty());
}

TEST_CASE("numbers are read whole or not at all") {
  CHECK(parse_int("-17") == -17);
  CHECK(parse_int("+5") == 5);
  CHECK(parse_int("9223372036854775807") == INT64_MAX);
  for (const char* bad : {"", "+", "-", "+-5", "++5", "5 ", " 5", "5.0", "0x10", "9223372036854775808", "1e3", "five"}) {
    CAPTURE(bad);
    CHECK_FALSE(parse_int(bad));
  }
  CHECK(parse_double("1e-3") == 0.001);
  CHECK(parse_double("+.5") == 0.5);
  for (const char* bad : {"", "+", "+-1", "1,5", "nan", "inf", "-inf", "1e999", "1.0x", " 1"}) {
    CAPTURE(bad);
    CHECK_FALSE(parse_double(bad));
  }
}

TEST_CASE("sizes know decimal and binary units") {
  CHECK(parse_bytes("1024") == 1024);
  CHECK(parse_bytes("60MB") == 60'000'000);
  CHECK(parse_bytes("2.9 MiB") == 3040870);
  CHECK(parse_bytes("1GiB") == 1073741824);
  CHECK(parse_bytes("1.5 kB") == 1500);
  for (const char* bad : {"", "MB", "-5MB", "5 parsecs", "1e30GB", "5 mb"}) {
    CAPTURE(bad);
    CHECK_FALSE(parse_bytes(bad));
  }
}

TEST_CASE("numbers for people") {
  CHECK(human_bytes(999) == "999 B");
  CHECK(human_bytes(2867297) == "2.87 MB");
  CHECK(human_bytes(123456789) == "123.5 MB");
  CHECK(human_seconds(75.2) == "1 min 15 s");
  CHECK(human_seconds(3700) == "1 h 1 min");
  CHECK(human_seconds(0.5) == "500 ms");
  CHECK(human_count(22713216) == "22.7M");
  CHECK(human_count(950) == "950");
  CHECK(fixed(1.005, 1) == "1.0");
  CHECK(shortest(0.1) == "0.1");
  CHECK(parse_double(shortest(1.0 / 3)) == 1.0 / 3);
}

TEST_CASE("splitting, joining, trimming") {
  CHECK(split("a.b..c", '.') == std::vector<std::string>{"a", "b", "", "c"});
  CHECK(split("", '.') == std::vector<std::string>{""});
  CHECK(join(std::vector<std::string>{"a", "b"}, ", ") == "a, b");
  CHECK(trim(" \t a b \n") == "a b");
  CHECK(trim("  ").empty());
  CHECK(replace_all("aXbX", "X", "XY") == "aXYbXY");
  CHECK(starts_with("abc", "ab"));
  CHECK_FALSE(ends_with("c", "bc"));
}

TEST_CASE("UTF-8 is checked strictly") {
  CHECK_FALSE(invalid_utf8("ascii, ü, 世, \xF0\x9F\x98\x80, \xEF\xBF\xBD"));
  struct Case {
    std::string text;
    std::size_t offset;
  };
  const Case cases[] = {{"ab\xff", 2}, {"\x80", 0}, {"a\xC3", 1}, {"\xC0\xAF", 0}, {"\xE0\x80\xAF", 0}, {"\xED\xA0\x80", 0}, {"\xF4\x90\x80\x80", 0}, {"\xF0\x9F\x98", 0}, {"ü\xE4\xB8", 2}};
  for (const Case& one : cases) CHECK(invalid_utf8(one.text) == one.offset);
  std::string all;
  for (const char32_t code : {U'a', U'ü', U'世', U'\U0001F600', U'\U0010FFFF'}) append_utf8(all, code);
  std::size_t at = 0;
  CHECK(next_code_point(all, at) == U'a');
  CHECK(next_code_point(all, at) == U'ü');
  CHECK(next_code_point(all, at) == U'世');
  CHECK(next_code_point(all, at) == U'\U0001F600');
  CHECK(next_code_point(all, at) == U'\U0010FFFF');
  CHECK(at == all.size());
}

}  // namespace kompakt
