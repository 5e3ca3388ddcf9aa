"""Every error that a user of moa_serve can meet, in one tree.

    MoaError                           code
    ├── InvalidRequest                 invalid_value             a prompt or a sampling parameter
    │   ├── ContextLengthExceeded      context_length_exceeded
    │   └── GrammarInvalid             invalid_grammar           what the text must be cannot be compiled or followed
    ├── ModelError                     the base cannot be served
    │   ├── ModelNotFound              base_not_found
    │   ├── ModelUnsupported           base_unsupported
    │   └── ModelCorrupt               base_corrupt
    ├── EngineError                    internal_error
    ├── Overloaded                     server_overloaded         too many requests are running or waiting
    │   ├── Draining                   draining                  the server is about to end
    │   └── OutOfMemory                out_of_memory             a step could not get the memory that this request needs
    ├── ModelNotListed                 model_not_found           a request names a model that is not served
    ├── DataInvalid                    data_invalid              a data file to train on or to evaluate with
    └── AdapterError                   an adapter cannot be used
        ├── AdapterNotFound            adapter_not_found
        ├── AdapterNameInvalid         adapter_name_invalid
        ├── AdapterExists              adapter_exists
        ├── AdapterBusy                adapter_busy              it is being loaded or unloaded, or requests still use it
        ├── AdapterUnavailable         adapter_unavailable       it left memory, and its files are gone or others now
        ├── AliasInvalid               alias_invalid             a name that cannot be one, or targets that it cannot have
        ├── AliasNotFound              alias_not_found
        ├── RevisionConflict           revision_conflict         a change of a revision that is not the current one
        ├── RevisionNotFound           revision_not_found        neither the current one nor kept
        ├── RegistryWriteFailed        registry_write_failed     the state directory cannot be written
        ├── AdapterLimit               adapter_limit
        ├── AdapterMemory              adapter_memory
        ├── AdapterPathDenied          adapter_path_denied
        ├── AdapterUnreadable          adapter_unreadable
        ├── AdapterIncomplete          adapter_incomplete
        ├── AdapterChanging            adapter_changing
        ├── AdapterTooLarge            adapter_too_large
        ├── AdapterCorrupt             adapter_corrupt
        ├── AdapterUnsafePickle        adapter_unsafe_pickle
        ├── AdapterConfigInvalid       adapter_config_invalid
        ├── AdapterUnsupported         adapter_unsupported
        ├── AdapterMismatch            adapter_shape_mismatch
        ├── AdapterNotFinite           adapter_not_finite
        ├── AdapterIneffective         adapter_ineffective
        ├── AdapterNonfiniteOutput     adapter_nonfinite_output
        └── AdapterQuarantined         adapter_quarantined

A message names what is wrong, which one, and what to do. `code` is stable: the HTTP layer sends it, scripts match on it.
Imports nothing of the package; owned by nobody.
"""

from collections.abc import Sequence


class MoaError(Exception):
    """A mistake that the user can mend, or a limit that the user can meet.

    Args:
        message: one sentence that names what, which, and what to do.
        param: the field or setting at fault, where there is one.
        problems: every single finding, where a check found several; by default just the message.
    """

    code = "moa_error"

    def __init__(self, message: str, *, param: str | None = None, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.param = param
        self.problems = tuple(problems) or (message,)


class InvalidRequest(MoaError):
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class GrammarInvalid(InvalidRequest):
    code = "invalid_grammar"


class ModelError(MoaError):
    code = "base_error"


class ModelNotFound(ModelError):
    code = "base_not_found"


class ModelUnsupported(ModelError):
    code = "base_unsupported"


class ModelCorrupt(ModelError):
    code = "base_corrupt"


class EngineError(MoaError):
    code = "internal_error"


class Overloaded(MoaError):
    """`retry_seconds`: when to try again."""

    code = "server_overloaded"

    def __init__(self, message: str, *, param: str | None = None, retry_seconds: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_seconds = retry_seconds


class ModelNotListed(MoaError):
    code = "model_not_found"


class DataInvalid(MoaError):
    code = "data_invalid"


class Draining(Overloaded):
    code = "draining"


class OutOfMemory(Overloaded):
    code = "out_of_memory"


class AdapterError(MoaError):
    code = "adapter_error"


class AdapterNotFound(AdapterError):
    code = "adapter_not_found"


class AdapterNameInvalid(AdapterError):
    code = "adapter_name_invalid"


class AdapterExists(AdapterError):
    code = "adapter_exists"


class AdapterBusy(AdapterError):
    code = "adapter_busy"


class AdapterUnavailable(AdapterError):
    code = "adapter_unavailable"


class AliasInvalid(AdapterError):
    code = "alias_invalid"


class AliasNotFound(AdapterError):
    code = "alias_not_found"


class RevisionConflict(AdapterError):
    code = "revision_conflict"


class RevisionNotFound(AdapterError):
    code = "revision_not_found"


class RegistryWriteFailed(AdapterError):
    code = "registry_write_failed"


class AdapterLimit(AdapterError):
    code = "adapter_limit"


class AdapterMemory(AdapterError):
    code = "adapter_memory"


class AdapterPathDenied(AdapterError):
    code = "adapter_path_denied"


class AdapterUnreadable(AdapterError):
    code = "adapter_unreadable"


class AdapterIncomplete(AdapterError):
    code = "adapter_incomplete"


class AdapterChanging(AdapterError):
    code = "adapter_changing"


class AdapterTooLarge(AdapterError):
    code = "adapter_too_large"


class AdapterCorrupt(AdapterError):
    code = "adapter_corrupt"


class AdapterUnsafePickle(AdapterError):
    code = "adapter_unsafe_pickle"


class AdapterConfigInvalid(AdapterError):
    code = "adapter_config_invalid"


class AdapterUnsupported(AdapterError):
    code = "adapter_unsupported"


class AdapterMismatch(AdapterError):
    code = "adapter_shape_mismatch"


class AdapterNotFinite(AdapterError):
    code = "adapter_not_finite"


class AdapterIneffective(AdapterError):
    code = "adapter_ineffective"


class AdapterNonfiniteOutput(AdapterError):
    code = "adapter_nonfinite_output"


class AdapterQuarantined(AdapterError):
    code = "adapter_quarantined"


def sized(num_bytes: int) -> str:
    """A number of bytes for a message: "1000 bytes", "3.20 MiB", "14.96 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def shown(value: object) -> str:
    """A user's value for a message: short, and never failing as the repr of a number of 10,000 digits does."""
    try:
        text = repr(value)
    except ValueError:
        return f"a number of {int.bit_length(value)} bits" if isinstance(value, int) else f"of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
