"""Prints what a machine has, as one line of JSON: device, versions, and why the GPU tests cannot be run there."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys


# Oldest that the package supports; newer ones than it was tried with are no reason not to try
OLDEST = {"torch": "2.11", "transformers": "5.17", "triton": "3.6"}
OPTIONAL = ("numpy", "pytest", "hypothesis", "accelerate", "peft", "trl", "liger-kernel", "kernels")
FOR_TESTS = ("pytest", "hypothesis")


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # ROCm's torch carries Triton under another name
        return "unknown" if importlib.util.find_spec(name.replace("-", "_")) else None


def older(version, oldest):
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return numbers < [int(part) for part in oldest.split(".")]


def problems(versions, device):
    for name, oldest in OLDEST.items():
        if versions[name] is None and (name != "triton" or device == "cuda"):
            yield f"{name} is not installed in {sys.executable}: {oldest} or newer is needed."
        elif versions[name] not in (None, "unknown") and older(versions[name], oldest):
            yield f"{name} {versions[name]} is older than {oldest}, the oldest that is supported."


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = parser.parse_args().device
    versions = {name: version_of(name) for name in (*OLDEST, *OPTIONAL)}
    versions["python"] = platform.python_version()
    found = list(problems(versions, device))
    described = {}
    if not found:
        import torch

        from transformers_dsv3.benchmark.devices import Device
        from transformers_dsv3.evaluation.machine import cpu_model

        if device == "cpu":
            described = {"name": "CPU", "cpu": cpu_model()}
        elif not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            reason = "it sees none" if built else "it is a build for CPUs"
            found.append(
                f"torch {torch.__version__} has no GPU to use here: {reason}. `--device cpu` rehearses at tiny sizes."
            )
        else:
            described = {**Device("cuda").record(), "cpu": cpu_model()}
    missing = [name for name in FOR_TESTS if versions[name] is None]
    print(
        json.dumps(
            {
                "problems": found,
                "device": described,
                "versions": versions,
                "missing_for_tests": f"{' and '.join(missing)} missing" if missing else None,
            }
        )
    )


if __name__ == "__main__":
    main()
