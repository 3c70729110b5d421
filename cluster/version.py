"""Which code this is: written into every artifact."""

import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path


@cache
def code_version() -> str:
    """Version of the installed distribution and, in a checkout, its commit."""
    version = metadata.version("heliostat")
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return version
    answer = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{version}+{answer.stdout.strip()}" if answer.returncode == 0 else version
