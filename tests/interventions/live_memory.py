"""The bytes of all tensors alive at once, at most, while a piece of code runs on the CPU."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Follows every storage that an operation within makes until it is freed; `peak` is the most at one time.

    What native kernels allocate inside is not seen; theirs take memory for one row and group, whatever the sweep.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._add(storage)
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._known.discard(key)
        self.live -= size
