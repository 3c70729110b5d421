"""How many threads a training process computes on."""

import threading


def compute_on(count: int) -> None:
    """Compute on `count` threads when called from this one, and on one in threads begun later.

    Each thread that starts a parallel region has a pool of its own, and libgomp's waiting threads
    spin only while all pools together have no more threads than there are cores (`do_spin` in its
    config/linux/wait.h); with one more they sleep at once. gloo's threads, which copy what they
    reduce, would be that one more: ZeRO 3 would wake its own threads thousands of times per step.
    """
    import torch

    torch.set_num_threads(count)
    # Asking makes it this thread's own number, before the default of later threads changes.
    torch.get_num_threads()
    later = threading.Thread(target=torch.set_num_threads, args=(1,))
    later.start()
    later.join()
