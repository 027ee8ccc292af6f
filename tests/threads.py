"""A fixture: one thread, for tensors so small that a second thread is not worth it, least of all on a busy machine."""
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
