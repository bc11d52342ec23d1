"""Import `torch_npu`, say in one sentence why it cannot be used, and know what its errors mean.

torch would import `torch_npu` by itself whenever torch is imported, and end with a traceback where
CANN is missing. The command lines turn that off (TORCH_DEVICE_BACKEND_AUTOLOAD=0), before they
import torch. Ascend's runtime (ACL) has no exception classes: its errors are RuntimeErrors with a
code in their text.
"""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Final

import torch

RELEASES: Final = ((2, 10), (2, 11), (2, 12), (2, 13), (2, 14))
"""The releases of torch that this project allows with `torch_npu`; each needs its own release."""

CANN_VARIABLES: Final = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""What `set_env.sh` of CANN sets to the folder it is in."""

_CANN_FOLDERS: Final = (
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/ascend-toolkit",
    str(Path.home() / "Ascend" / "cann"),
    str(Path.home() / "Ascend" / "ascend-toolkit"),
)

# Of the driver, which a container gets from its host.
_DRIVER_LIBRARIES: Final = ("libascend_hal.so", "libdrvdsmi_host.so", "libdcmi.so", "libc_sec.so")

_MISSING_LIBRARY: Final = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")
_CODE: Final = re.compile(
    # The texts of torch_npu, of ACL ("runtime result = 507015"), and of the runtime's own log.
    r"(?:error code(?: is|:)?|runtime result =|ErrCode=|retCode[=:]|acl_ret =)\s*:?\s*(\d{6})\b"
)

# 507xxx are internal errors of runtime, driver and device: a stopped core, a lost heartbeat, broken
# memory. 107020 and 107022 say that a task timed out or was aborted. Afterwards every call fails.
_LOST_CODES: Final = re.compile(r"507\d{3}|107020|107022")

# torch_npu and its libraries report these without a code. After the first error its task queue
# stops for good. HCCL's errors leave the ranks with different ideas of what was exchanged.
_LOST_WORDS: Final = (
    "The process exits for this inner error",
    "ACL stream synchronize failed",
    "UCE ERROR",
    "HBM MULTI BIT ECC ERROR",
    "SUSPECT MEM ERROR",
    "SUSPECT REMOTE ERROR",
    "HCCS LINK ERROR",
    "FORCE STOP",
    "HCCL function error",
    "HCCL error in",
    "OPS function error: Hccl",
    "call hccl api failed",
    "hccl fftsplus task timeout",
)

# A code of a failed allocation: 207001 of the host's or the device's memory, 207018 of a stream's.
_FULL_CODES: Final = ("207001", "207018")


def import_problem() -> str | None:
    """Import `torch_npu`; return why that does not work, with the remedy, or None."""
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return (
            "torch_npu is not installed; install the release that goes with torch "
            f"{torch.__version__}, {_partner(torch.__version__)}"
        )
    if release(version) != release(torch.__version__):
        return pair_problem(torch.__version__, version)
    if sys.modules.get("torch_npu", sys) is None:
        del sys.modules["torch_npu"]  # the command lines hide it from diffusers
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return explain_import(error, version)
    return None


def pair_problem(torch_version: str, npu_version: str) -> str:
    """Say that two versions do not go together, and which do."""
    major, minor = release(npu_version) or (0, 0)
    return (
        f"torch_npu {npu_version} does not go with torch {torch_version}: it needs torch "
        f"{major}.{minor}; install that, or {_partner(torch_version)}"
    )


def explain_import(error: BaseException, version: str) -> str:
    """Say what an error of `import torch_npu` means, and what to do about it."""
    text = str(error)
    if "Two accelerators" in text:
        return (
            "torch_npu refuses this torch, which is built for CUDA and finds a GPU: install the "
            "build of torch for the CPU (its version ends with +cpu), or use the GPU"
        )
    missing = _MISSING_LIBRARY.search(text)
    if missing is not None:
        return _explain_missing(missing.group(1))
    symbol = re.search(r"undefined symbol: (\w+)", text)
    if symbol is not None:
        return (
            f"torch_npu {version} finds no {symbol.group(1)[:80]} in the libraries here: torch "
            f"{torch.__version__} is another build than it was made for, or CANN is older than it "
            "needs; install the pair that requirements/npu names, with its CANN"
        )
    first = next(iter(text.splitlines()), "")
    return f"torch_npu {version} cannot be imported ({type(error).__name__}: {first[:200]})"


def card_problem() -> str:
    """Say why an imported `torch_npu` finds no card, as far as the machine's files tell."""
    if not glob.glob("/dev/davinci[0-9]*"):
        where = "this container" if Path("/.dockerenv").exists() else "this machine"
        return (
            f"there is no Ascend card in {where} (no /dev/davinci0): install the driver, or start "
            "the container with the card (--device /dev/davinci0, /dev/davinci_manager, "
            "/dev/devmm_svm, /dev/hisi_hdc, and the driver's folder mounted)"
        )
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        return (
            f"ASCEND_RT_VISIBLE_DEVICES is {visible!r}, which names no card here: they are counted "
            "from 0 within this container; correct or unset it"
        )
    return (
        "the driver shows this process no Ascend card, although there is /dev/davinci*: another "
        "container may hold it ('npu-smi info' then says -8005 or -8020), or this user may not "
        "open it; end the other container, or use another card"
    )


def start_problem(error: BaseException) -> str:
    """Say what it means that a card cannot be made the current one."""
    code = error_code(error)
    first = " ".join(str(error).split())[:300]
    if code is not None and _LOST_CODES.fullmatch(code):
        return (
            f"the card does not start (ACL error {code}): another container may hold it, or driver "
            f"and CANN do not go together; 'npu-smi info' and {log_folder()} say more ({first})"
        )
    return f"the card does not start ({first})"


def log_folder() -> str:
    """Return where CANN writes its log."""
    return os.environ.get("ASCEND_PROCESS_LOG_PATH", "~/ascend/log")


def error_code(error: BaseException) -> str | None:
    """Return the first code of Ascend's runtime in an error's text."""
    found = _CODE.search(str(error))
    return None if found is None else found.group(1)


def says_lost(error: BaseException) -> bool:
    """Return whether an error's text says that the card can do nothing more in this process."""
    text = str(error)
    codes = (found.group(1) for found in _CODE.finditer(text))
    return any(word in text for word in _LOST_WORDS) or any(map(_LOST_CODES.fullmatch, codes))


def says_full(error: BaseException) -> bool:
    """Return whether an error's text has Ascend's codes of exhausted memory."""
    text = str(error)
    return "EL0004" in text or error_code(error) in _FULL_CODES


def release(version: str) -> tuple[int, int] | None:
    """Return the first two numbers of a version, which have to agree."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found.group(1)), int(found.group(2)))


def _partner(torch_version: str) -> str:
    """Name the release of `torch_npu` that goes with a torch."""
    own = release(torch_version)
    if own in RELEASES:
        return f"torch_npu {own[0]}.{own[1]}"
    known = ", ".join(f"{major}.{minor}" for major, minor in RELEASES)
    return f"torch and torch_npu of one release out of {known}"


def _explain_missing(library: str) -> str:
    if library.startswith(_DRIVER_LIBRARIES):
        return (
            f"{library} of the Ascend driver is missing: install the driver, or mount "
            "/usr/local/Ascend/driver into the container and put its lib64 folders on "
            "LD_LIBRARY_PATH"
        )
    home = next((os.environ[name] for name in CANN_VARIABLES if os.environ.get(name)), None)
    if home is not None:
        return (
            f"{library} of CANN is missing, although CANN is set up in {home}: install the whole "
            "toolkit and the kernels for the card, of the version that requirements/npu names, and "
            "source its set_env.sh again"
        )
    for folder in _CANN_FOLDERS:
        script = Path(folder) / "set_env.sh"
        if script.is_file():
            return f"{library} of CANN is not found: run 'source {script}' before the start"
    return (
        f"{library} of CANN is missing: install CANN (the toolkit and the kernels for the card), "
        f"and run 'source {_CANN_FOLDERS[0]}/set_env.sh' before the start"
    )
