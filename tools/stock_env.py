"""An environment in which `transformers serve` runs, for `relook bench load --transformers-serve DIR/bin/python`.

    python tools/stock_env.py DIR

Wants torchvision, which relook's own environment is better without. Where the package index has torchvision for another
build of torch than the one that is installed (for CUDA, on a machine without), its compiled operators do not load: two
are declared here before it is imported, and images are decoded by Pillow. All other packages are those of the Python
that runs this.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

TORCHVISION = "torchvision==0.28.0"  # pairs with torch 2.13

SHIM = '''\
import sys
from importlib.machinery import PathFinder


class Shim:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            import torch

            module._declared = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                module._declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            run(module)
            import torchvision.io

            torchvision.io.decode_image = torchvision.io.image.decode_image = decode_image

        spec.loader.exec_module = exec_module
        return spec


def decode_image(data, mode=None, **options):
    """(3, h, w) bytes of an encoded image."""
    import io

    import numpy
    import torch
    from PIL import Image

    image = Image.open(io.BytesIO(bytes(data.numpy()))).convert("RGB")
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


sys.meta_path.insert(0, Shim)
'''


def main(folder: Path) -> None:
    import torch

    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), TORCHVISION], check=True)
    (site / "zz_installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not torch.cuda.is_available():
        (site / "torchvision_shim.py").write_text(SHIM)
        (site / "00_shim.pth").write_text("import torchvision_shim\n")
    print(folder / "bin" / "python")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
