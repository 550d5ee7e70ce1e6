"""Arrays kept in files: whole, or known not to be."""

import numpy as np

from aligner import arrays


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "kept.npz"
    arrays.write(path, ids=np.arange(5), sizes=np.ones((2, 3), np.int32), words="a text")
    found = arrays.read(path)
    assert found.keys() == {"ids", "sizes", "words"} and str(found["words"]) == "a text"
    assert np.array_equal(found["ids"], np.arange(5)) and found["sizes"].dtype == np.int32
    with np.load(path) as plain:  # and by NumPy alone
        assert np.array_equal(plain["ids"], np.arange(5))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npz"], "nothing is left beside it"


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "kept.npz"
    arrays.write(path, ids=np.arange(40), words="a text")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert arrays.read(path) is None, place
    for damaged in (b"", whole[:3], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        assert arrays.read(path) is None
    path.unlink()
    assert arrays.read(path) is None
