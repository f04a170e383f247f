"""Which files of a folder are pictures, and the names of their results."""

from __future__ import annotations

from pathlib import Path

from resshift.folder import find_pictures
from tests.pictures import encoded, noise, tiff_of

HEADER_OF_RAW = b"FUJIFILMCCD-RAW 0201"


def names(folder: Path, *files: str) -> tuple[dict[str, str], int, list[str]]:
    """Return the result of each picture, the number of other files and the refused files, as names."""
    contents = {".jpg": encoded(format="JPEG"), ".png": encoded(), ".raf": HEADER_OF_RAW, "": encoded()}
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.get(path.suffix, b"{}"))
    found = find_pictures([str(folder)], "/out", "png", 4)
    return (
        {task.source.removeprefix(f"{folder}/"): task.target for task in found.tasks},
        found.num_others,
        [Path(uri).name for uri, _ in found.refused],
    )


def test_results_keep_the_tree_and_sidecars_are_left_out(tmp_path: Path) -> None:
    made, num_others, refused = names(tmp_path, "a.jpg", "deep/b.png", "a.json", "a.AAE", ".DS_Store.x")
    assert made == {"a.jpg": "/out/a_x4.png", "deep/b.png": "/out/deep/b_x4.png"}
    assert (num_others, refused) == (3, [])


def test_content_tells_a_picture_without_a_name(tmp_path: Path) -> None:
    assert names(tmp_path, "scan")[0] == {"scan": "/out/scan_x4.png"}


def test_pictures_of_one_stem_do_not_hide_each_other(tmp_path: Path) -> None:
    """Both are called by their whole names, in whatever order they come into the folder: what is there is not
    taken for the result of the other.
    """
    assert names(tmp_path, "a.png")[0] == {"a.png": "/out/a_x4.png"}
    assert names(tmp_path, "a.jpg")[0] == {"a.jpg": "/out/a.jpg_x4.png", "a.png": "/out/a.png_x4.png"}


def test_camera_raw_is_left_out_beside_its_picture_and_refused_alone(tmp_path: Path) -> None:
    made, num_others, refused = names(tmp_path, "a.jpg", "a.raf", "b.raf")
    assert list(made) == ["a.jpg"]
    assert (num_others, refused) == (1, ["b.raf"])


def test_camera_raw_is_known_by_a_directory_far_behind(tmp_path: Path) -> None:
    (tmp_path / "a.dng").write_bytes(tiff_of([(noise(0, 200, 300), {262: 32803})]))  # behind 180 kB
    assert names(tmp_path, "a.jpg")[1:] == (1, [])
