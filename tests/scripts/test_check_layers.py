"""Each rule of scripts/check_layers.py must fire on a tree that breaks it, and stay silent on one that does not."""

import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import check_layers  # noqa: E402


class CheckLayers(unittest.TestCase):
    def check(self, files):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for name, text in {"core/error.h": "", "train/loop.h": "", "quantize/grids.h": "", "quantize/qad.h": "", **files}.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            return check_layers.check(root)

    def broken(self, files, part):
        violations, _ = self.check(files)
        self.assertEqual(len(violations), 1, violations)
        self.assertIn(part, violations[0])

    def test_clean_tree(self):
        files = {
            "formats/gguf.cpp": '#include "core/error.h"\n#include "formats/gguf.h"\n#include <vector>\n',
            "formats/gguf.h": "",
            "export/pack.cpp": '#include "quantize/grids.h"\n#include <ATen/ATen.h>\n',
            "tests/export/pack_test.cpp": '#include "quantize/qad.h"\nusing namespace kompakt;\n',
            "data/binary.bin": b"\xff\xfe\x00",
        }
        self.assertEqual(self.check(files), ([], []))

    def test_wrong_direction(self):
        self.broken({"core/a.cpp": '\n#include "train/loop.h"\n'}, "core/a.cpp:2: core/ may not include train/loop.h")
        self.broken({"distill/a.cpp": '#include "quantize/qad.h"\n'}, "distill/ may not include quantize/qad.h")
        self.broken({"prune/a.h": "#  include <quantize/qad.h>\n"}, "prune/ may not include quantize/qad.h")
        self.broken({"cli/main.cpp": '#include "train/loop.h"\n'}, "allowed: cli, core, report, pipeline")

    def test_one_file_of_a_folder(self):
        self.broken({"export/a.cpp": '#include "quantize/qad.h"\n'}, "export/ may not include quantize/qad.h")

    def test_product_does_not_include_tests(self):
        self.broken({"core/a.cpp": '#include "tests/support.h"\n', "tests/support.h": ""}, "product code includes tests/support.h")

    def test_folder_in_every_include(self):
        self.broken({"core/a.cpp": '#include "error.h"\n'}, 'write "core/error.h"')
        self.broken({"core/a.cpp": '#include "core/gone.h"\n'}, "core/gone.h does not exist")

    def test_torch(self):
        self.broken({"model/a.h": "#include <torch/torch.h>\n"}, "torch/torch.h in a header")
        self.broken({"tests/a.h": "#include <torch/nn.h>\n"}, "torch/nn.h in a header")
        self.broken({"report/a.cpp": "#include <ATen/ATen.h>\n"}, "report/ is free of torch")
        self.broken({"quantize/cuda/a.cu": "#include <c10/cuda/CUDAStream.h>\n"}, "no torch header")
        violations, warnings = self.check({"model/a.cpp": "#include <torch/torch.h>\n"})
        self.assertEqual((len(violations), len(warnings)), (0, 1))

    def test_doors(self):
        both = {"core/a.cpp": "#include <yaml-cpp/yaml.h>\n", "pipeline/b.cpp": '#include "yaml-cpp/node/node.h"\n'}
        self.broken(both, "yaml-cpp has 2 doors, one is allowed: core/a.cpp:1, pipeline/b.cpp:1")
        self.broken({"report/a.cpp": "#include <nlohmann/json.hpp>\n"}, "through core/json.h only")
        self.broken({"quantize/a.cpp": "#include <ATen/Parallel.h>\n"}, "through model/parallel.h only")
        self.assertEqual(self.check({"core/json.h": "#include <nlohmann/json.hpp>\n", "tests/a.cpp": "#include <hdf5.h>\n", "formats/b.cpp": "#include <hdf5.h>\n"}), ([], []))

    def test_using_namespace(self):
        self.broken({"core/a.cpp": "using namespace kompakt;\n"}, "unity build")
        self.assertEqual(self.check({"core/a.cpp": "void f() {\n  using namespace std::chrono;\n}\n"}), ([], []))
        self.broken({"core/a.cpp": "using namespace std;\n"}, "unity build")
        violations, warnings = self.check({"core/a.h": "namespace kompakt::bits {\n}\n", "core/a.cpp": "using namespace bits;\n"})
        self.assertEqual((len(violations), len(warnings)), (0, 1))

    def test_machine_paths(self):
        self.broken({"docs/a.md": "see " + "/".join(["", "home", "someone", "notes"])}, "a path of one machine")
        self.broken({"core/a.cpp": '// "' + "/".join(["", "work", "x"]) + '"'}, "a path of one machine")
        self.assertEqual(self.check({"docs/a.md": "a/" "work/b and ../" "work/c and https://x.org/home/page"}), ([], []))

    def test_package_index(self):
        self.broken({"scripts/a.sh": "pip install -i https://" + "pypi" + ".org/simple x"}, "host of a package index")

    def test_length(self):
        violations, warnings = self.check({"core/a.cpp": "\n" * 501})
        self.assertEqual((len(violations), len(warnings)), (0, 1))
        self.broken({"core/a.cpp": "\n" * 801}, "801 lines")


if __name__ == "__main__":
    unittest.main()
