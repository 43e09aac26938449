"""A client of ``ttt4as serve``, with nothing but Python's standard library.

ttt4as serve screw.safetensors &
python examples/serve_client.py photo.png --url http://127.0.0.1:8080 --mask mask.png
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path


def main() -> None:
    """Post one image, print its verdict and regions, write its mask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--mask", type=Path, help="where to write the mask, PNG")
    options = parser.parse_args()
    request = urllib.request.Request(
        f"{options.url}/segment", options.image.read_bytes(), {"Content-Type": "application/octet-stream"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['error']}")
    except urllib.error.URLError as error:
        sys.exit(f"{options.url}: {error.reason}")
    print(f"score {answer['score']:.4g}, label {answer['label']}, status {answer['status']}")
    for region in answer["regions"]:
        print("region at ({x}, {y}), {width} x {height}, {area} pixels, peak {peak_score:.4g}".format(**region))
    if options.mask:
        options.mask.write_bytes(base64.b64decode(answer["mask"]))


if __name__ == "__main__":
    main()
