"""The checks of `moa-serve doctor`, in their order. A new one is a function from a subject to a finding, and a line here."""

from moa_serve.shell.doctor import installation, parity, speed
from moa_serve.shell.doctor.findings import Check

INSTALLATION = (
    Check("Python", installation.python),
    Check("packages", installation.packages),
    Check("torch", installation.torch_build),
    Check("triton", installation.triton),
    Check("compiler", installation.compiler),
    Check("native library", installation.native_library),
    Check("processor", installation.processor),
    Check("cores", installation.cores),
    Check("memory", installation.memory),
    Check("base", installation.base),
    Check("cache folder", installation.cache_folder),
    Check("open files", installation.open_files),
    Check("GPU", installation.gpu),
)

# On the device that would serve; what is first wrong explains what comes after it.
COMPUTING = (
    Check("kernel parity", parity.kernels),
    Check("golden parity", parity.golden_numbers),
    Check("swaps", parity.swaps),
    Check("bench", speed.bench),
)
