"""The cores that requests share."""

import threading

import pytest
import torch

from apps.samloop.shared_cores import SharedCores


@pytest.mark.usefixtures("one_thread")
def test_who_is_alone_has_all_cores_and_who_comes_meanwhile_a_share():
    cores, found = SharedCores(4), {}
    begun, end = threading.Event(), threading.Event()

    def long_request():
        with cores.request():
            found["alone"] = torch.get_num_threads()
            begun.set()
            end.wait(10)
            found["still"] = torch.get_num_threads()

    first = threading.Thread(target=long_request)
    first.start()
    assert begun.wait(10)
    with cores.request() as mine, cores.request() as least, cores.request(), cores.request():
        assert torch.get_num_threads() == 1
    end.set()
    first.join()
    assert (found, mine, least) == ({"alone": 4, "still": 4}, 2, 1)
    with pytest.raises(RuntimeError), cores.request():
        raise RuntimeError
    with cores.request() as again:
        assert again == torch.get_num_threads() == 4
