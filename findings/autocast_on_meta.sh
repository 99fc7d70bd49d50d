#!/usr/bin/env bash
# torch.autocast: it cannot even be switched off on the meta device, where shapes are tried out.
#
# Package: torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   `with torch.autocast(x.device.type, enabled=False)` is how code keeps a block out of the caller's autocast, whatever its device. For
#   "cpu" it is entered. For "meta" the constructor raises RuntimeError "unsupported scalarType", which names neither the device nor
#   the argument. torch.amp.is_autocast_available("meta") is False, so it can be asked beforehand. A made-up device type raises an error that
#   names it.
#   So a module with such a block cannot be run on meta tensors, unlike everything around it.
# Printed: what each device gives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > see.py <<'PY'
import torch


def entered(device_type):
    try:
        with torch.autocast(device_type, enabled=False):
            return "entered"
    except RuntimeError as error:
        return "RuntimeError: " + str(error).splitlines()[0]


got = {name: entered(name) for name in ("cpu", "meta", "toaster")}
available = {name: torch.amp.is_autocast_available(name) for name in ("cpu", "meta")}
for name, what in got.items():
    print(f"{name}: {what}")
print("is_autocast_available:", available)
assert torch.empty(2, 3, device="meta").exp().shape == (2, 3)
assert got["cpu"] == "entered" and available == {"cpu": True, "meta": False}, "behavior has changed"
assert got["meta"] == "RuntimeError: unsupported scalarType", "behavior has changed"
assert "toaster" in got["toaster"], "behavior has changed"
PY
venv/bin/python see.py
