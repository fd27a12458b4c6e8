"""The failures that a client is told about, each with its status, code and sentence."""

MIB = 1 << 20


class ServiceError(Exception):
    status = 500
    code = "internal_error"
    message = "Something went wrong here. It has been logged under this id."
    retry_after: int | None = None
    # The status with which the model server refused the request, where that is the reason: it would do so again.
    refused: int | None = None

    def __init__(self, message: str | None = None, *, retry_after: int | None = None, refused: int | None = None) -> None:
        self.message = message or self.message
        self.refused = refused
        self.retry_after = retry_after or self.retry_after
        super().__init__(self.message)


class InvalidJson(ServiceError):
    status = 400
    code = "invalid_json"
    message = "The body is not valid JSON."


class BadRequest(ServiceError):
    status = 400
    code = "bad_request"
    message = "The request cannot be understood."


class NotFound(ServiceError):
    status = 404
    code = "not_found"
    message = "There is nothing here."


class MethodNotAllowed(ServiceError):
    status = 405
    code = "method_not_allowed"
    message = "This method is not allowed."


class StorageFull(ServiceError):
    status = 403
    code = "storage_full"

    def __init__(self, used: int, more: int, limit: int) -> None:
        """All in bytes."""
        wanted = f", and {_mib(more)} more are needed" if more >= MIB // 10 else ""
        super().__init__(f"{_mib(used)} of the {_mib(limit)} that one user or key may store are used{wanted}. Delete threads or items.")


class ThreadBusy(ServiceError):
    status = 409
    code = "thread_busy"
    message = "The thread is busy with another message."


class ThreadExists(ServiceError):
    status = 409
    code = "thread_exists"
    message = "A thread of this name exists already."


class AssistantExists(ServiceError):
    status = 409
    code = "assistant_exists"
    message = "An assistant of this name exists already."


class TooManyAssistants(ServiceError):
    status = 403
    code = "too_many_assistants"

    def __init__(self, most: int) -> None:
        super().__init__(f"There are {most} assistants, which is as many as one user or key may have. Delete some.")


class TooManyCrons(ServiceError):
    status = 403
    code = "too_many_crons"

    def __init__(self, most: int) -> None:
        super().__init__(f"There are {most} crons, which is as many as one user or key may have. Delete some.")


class TurnConflict(ServiceError):
    status = 409
    code = "turn_conflict"
    message = "This turn id was used for another message."


class Cancelled(ServiceError):
    status = 409
    code = "cancelled"
    message = "The answer was stopped."


class NothingWaits(ServiceError):
    status = 409
    code = "nothing_waits"
    message = "The thread waits for no answer."


class MessageExists(ServiceError):
    status = 409
    code = "message_exists"
    message = "The thread has a message of this id already."


class BodyTooLarge(ServiceError):
    status = 413
    code = "body_too_large"
    message = "The body is too large."


class ThreadTooLarge(ServiceError):
    status = 422
    code = "thread_too_large"

    def __init__(self, size: int, limit: int) -> None:
        """Both in bytes."""
        super().__init__(f"The thread's messages have {_mib(size)}, and {_mib(limit)} are allowed. Start a new thread, or remove messages.")


class UnsupportedMediaType(ServiceError):
    status = 415
    code = "unsupported_media_type"
    message = "The body must be sent as application/json."


class InvalidRequest(ServiceError):
    status = 422
    code = "invalid_request"


class NotSupported(ServiceError):
    status = 422
    code = "not_supported"
    message = "This is not supported here."

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConversationTooLong(ServiceError):
    status = 422
    code = "conversation_too_long"
    message = "The conversation no longer fits the model. Send a shorter message or start a new thread."


class CannotSee(ServiceError):
    status = 422
    code = "model_cannot_see"
    message = "The model that serves cannot see images. Send text alone."


class TooManySteps(ServiceError):
    status = 422
    code = "too_many_steps"
    message = "The agent found no answer within the number of steps it may take."


class RateLimited(ServiceError):
    status = 429
    code = "rate_limited"
    message = "Too many requests. Try again later."


class ModelFailed(ServiceError):
    status = 502
    code = "model_failed"
    message = "The model gave no usable answer."


class ModelUnavailable(ServiceError):
    status = 503
    code = "model_unavailable"
    message = "The model cannot be reached at the moment."
    retry_after = 5


class StorageUnavailable(ServiceError):
    status = 503
    code = "storage_unavailable"
    message = "The conversation cannot be stored at the moment."
    retry_after = 5


class ShuttingDown(ServiceError):
    status = 503
    code = "shutting_down"
    message = "The service is stopping."
    retry_after = 5


class TurnTimeout(ServiceError):
    status = 504
    code = "turn_timeout"
    message = "The answer took too long."


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
