"""Downloads against a server on the loopback address: resumed, checked, whole or not at all."""

import gzip
import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from data_files import ROW, same
from PIL import Image

from spear import data
from spear.data import downloads, packs
from spear.data.downloads import Archive

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; honours ranges if `server.ranges`, and hangs up after `server.cut` bytes if it is set."""

    def do_GET(self):
        content = self.server.files.get(self.path)
        self.server.requests.append((self.path, self.headers.get("Range")))
        if content is None:
            self.send_error(404)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.ranges else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests, server.ranges, server.cut = {"/some.bin": CONTENT}, [], True, None
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive(server, name="some.bin", content=CONTENT, algorithm="sha256"):
    address = f"http://127.0.0.1:{server.server_address[1]}/{name}"
    return Archive(address, algorithm, hashlib.new(algorithm, content).hexdigest())


def files(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_arrives_whole_and_progress_reaches_its_size(server, tmp_path, algorithm):
    seen = []
    some = archive(server, algorithm=algorithm)
    path = downloads.download(some, tmp_path, progress=lambda *counts: seen.append(counts))
    assert path.read_bytes() == CONTENT
    assert files(tmp_path) == ["some.bin"]
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert {total for _, total in seen} == {len(CONTENT)}
    downloads.download(some, tmp_path)
    assert len(server.requests) == 1  # what is there is not fetched again


@pytest.mark.parametrize("cut", [1, 100_000, 2_999_999])
def test_a_connection_that_ends_early_is_an_error_and_the_next_call_resumes(server, tmp_path, cut):
    server.cut = cut
    with pytest.raises(OSError, match="some.bin.*run the command again to resume"):
        downloads.download(archive(server), tmp_path)
    assert files(tmp_path) == ["some.bin.part"]
    assert (tmp_path / "some.bin.part").read_bytes() == CONTENT[:cut]
    server.cut = None
    assert downloads.download(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [("/some.bin", None), ("/some.bin", f"bytes={cut}-")]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "some.bin.part").write_bytes(CONTENT[:1000])
    assert downloads.download(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_complete_already_is_taken(server, tmp_path):
    (tmp_path / "some.bin.part").write_bytes(CONTENT)
    assert downloads.download(archive(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [None, b"foreign bytes", CONTENT + b"more"])
def test_a_wrong_checksum_deletes_what_arrived(server, tmp_path, part):
    wrong = archive(server, content=b"other") if part is None else archive(server)
    if part is not None:
        (tmp_path / "some.bin.part").write_bytes(part)
    with pytest.raises(ValueError, match=f"some.bin: sha256 is .*, not {wrong.digest}; it was deleted"):
        downloads.download(wrong, tmp_path)
    assert files(tmp_path) == []


def test_a_missing_file_and_an_absent_server_are_errors_that_name_the_address(server, tmp_path):
    with pytest.raises(OSError, match="cannot download http://127.0.0.1.*/none.bin.*404"):
        downloads.download(archive(server, "none.bin"), tmp_path)
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:9/some.bin"):
        downloads.download(Archive("http://127.0.0.1:9/some.bin", "md5", ""), tmp_path)
    assert files(tmp_path) == []


def publish(server, monkeypatch, name, contents):
    server.files |= {f"/{file}": content for file, content in contents.items()}
    known = downloads.ARCHIVES[name]
    assert [some.name for some in known] == list(contents)
    local = tuple(archive(server, file, content) for file, content in contents.items())
    monkeypatch.setitem(downloads.ARCHIVES, name, local)


def test_mnist_is_fetched_into_a_pack(server, tmp_path, monkeypatch, mnist_files):
    pack, contents = mnist_files
    publish(server, monkeypatch, "mnist", {f"{file}.gz": gzip.compress(content) for file, content in contents.items()})
    assert data.fetch("mnist", tmp_path) == tmp_path / "mnist.npz"
    assert same(packs.read(tmp_path / "mnist.npz"), pack)
    assert files(tmp_path) == ["mnist.npz"]
    data.fetch("mnist", tmp_path)
    assert len(server.requests) == 2  # what is there is not fetched again


def test_cifar10_is_fetched_into_a_pack(server, tmp_path, monkeypatch, cifar10_files):
    pack, folder = cifar10_files
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    publish(server, monkeypatch, "cifar10", {"cifar-10-python.tar.gz": content.getvalue()})
    root = tmp_path / "root"
    data.fetch("cifar10", root)
    assert same(packs.read(root / "cifar10.npz"), pack)
    assert files(root) == ["cifar10.npz"]


def test_tinyimagenet_is_fetched_into_a_pack(server, tmp_path, monkeypatch):
    content, colours = io.BytesIO(), ("red", "lime", "blue")
    with zipfile.ZipFile(content, "w") as made:
        made.writestr("tiny-imagenet-200/wnids.txt", "n02\nn01\n")
        lines = [f"val_{i}.JPEG\tn0{i % 2 + 1}\t0\t0\t9\t9\n" for i in range(3)]
        made.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
        for i, colour in enumerate(colours):
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), colour).save(picture, "JPEG")
            made.writestr(f"tiny-imagenet-200/val/images/val_{i}.JPEG", picture.getvalue())
    publish(server, monkeypatch, "tinyimagenet", {"tiny-imagenet-200.zip": content.getvalue()})
    data.fetch("tinyimagenet", tmp_path)
    pack = packs.read(tmp_path / "tinyimagenet.npz")
    assert pack.classes == ("n02", "n01")
    assert pack.labels.tolist() == [1, 0, 1]
    assert pack.images.mean((1, 2)).argmax(-1).tolist() == [0, 1, 2]
    assert files(tmp_path) == ["tinyimagenet.npz"]


def test_adult_is_fetched_as_a_table(server, tmp_path, monkeypatch):
    publish(server, monkeypatch, "adult", {"adult.data": f"{ROW}\n".encode()})
    assert data.fetch("adult", tmp_path) == tmp_path / "adult.csv"
    assert len(data.load("adult", count=1, root=tmp_path)[0]) == 1
    assert files(tmp_path) == ["adult.csv"]


def test_an_interrupted_fetch_is_no_data_set_until_it_is_resumed(server, tmp_path, monkeypatch):
    publish(server, monkeypatch, "adult", {"adult.data": f"{ROW}\n".encode()})
    server.cut = 50
    with pytest.raises(OSError, match="run the command again to resume"):
        data.fetch("adult", tmp_path)
    assert not data.available("adult", tmp_path)
    with pytest.raises(FileNotFoundError, match="run `spear data fetch adult`"):
        data.load("adult", count=1, root=tmp_path)
    server.cut = None
    data.fetch("adult", tmp_path)
    assert server.requests[-1] == ("/adult.data", "bytes=50-")
    assert data.available("adult", tmp_path)


def test_a_fetch_that_got_nothing_or_the_wrong_thing_leaves_nothing(server, tmp_path, monkeypatch):
    publish(server, monkeypatch, "adult", {"adult.data": f"{ROW}\n".encode()})
    server.files["/adult.data"] = b"altered"
    with pytest.raises(ValueError, match="adult.data: sha256 is .*; it was deleted"):
        data.fetch("adult", tmp_path)
    del server.files["/adult.data"]
    with pytest.raises(OSError, match="404"):
        data.fetch("adult", tmp_path)
    assert files(tmp_path) == []


def test_a_damaged_file_is_not_taken_for_a_fetched_one(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"cut")
    with pytest.raises(ValueError, match="mnist.npz is no sample pack"):
        data.fetch("mnist", tmp_path)


def test_what_has_nothing_to_download_says_so(tmp_path):
    with pytest.raises(ValueError, match="photos ships with .* there is nothing to fetch"):
        data.fetch("photos", tmp_path)
    with pytest.raises(ValueError, match="imagenet is not under .* forbid a download"):
        data.fetch("imagenet", tmp_path)


def test_addresses_and_checksums_are_torchvisions():
    from torchvision.datasets import CIFAR10, MNIST

    published = {(mirror + file, digest) for mirror in MNIST.mirrors for file, digest in MNIST.resources}
    published.add((CIFAR10.url, CIFAR10.tgz_md5))
    for some in downloads.ARCHIVES["mnist"] + downloads.ARCHIVES["cifar10"]:
        assert (some.url, some.digest) in published
        assert some.algorithm == "md5"
