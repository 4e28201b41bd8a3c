"""Lists of videos as data sets publish them."""

import json

import pytest

from mone.data.video_lists import read_video_list


def test_something_something_v2(tmp_path):
    file = tmp_path / "something-something-v2-train.json"
    entries = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "vicks vaporub bottle"],
        },
        {"id": "42326", "label": "letting roller roll", "template": "Rolling [something] on a flat surface"},
    ]
    file.write_text(json.dumps(entries))
    assert read_video_list(str(file)) == [
        ("78687", "Holding something next to something"),
        ("42326", "Rolling something on a flat surface"),
    ]


def test_kinetics(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "testifying,---QUuC4vJs,84,94,train\n"
        '"eating, spaghetti",--3ouPhoy2A,20.0,30.0,train\n'
    )
    assert read_video_list(str(file)) == [
        ("---QUuC4vJs_000084_000094", "testifying"),
        ("--3ouPhoy2A_000020_000030", "eating, spaghetti"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "path,label\na.mp4,cat\nb/c.webm,dog\n", [("a.mp4", "cat"), ("b/c.webm", "dog")]),
        ("a.csv", "\ufefflabel;video_id\nDoing this;7\n", [("7", "Doing this")]),
        ("a.csv", "100218;Doing other things, twice\n24413;Swiping Left\n", None),
        ("a.csv", "x/1.mp4,3\nx/2.mp4,11\n", [("x/1.mp4", "3"), ("x/2.mp4", "11")]),
        ("a.csv", "x/1.mp4,action\nx/2.mp4,rest\n", [("x/1.mp4", "action"), ("x/2.mp4", "rest")]),
        ("a.csv", "x/one,action\nx/two,rest\n", [("x/one", "action"), ("x/two", "rest")]),
        ("a.csv", "clip_name,clip_path,label\n1,B/1.avi,B\n", [("B/1.avi", "B")]),
        ("a.csv", 'a.mp4,"push; pull"\nb.mp4,roll\n', [("a.mp4", "push; pull"), ("b.mp4", "roll")]),
        ("a.json", '[{"id": 1, "label": 3}]', [("1", "3")]),
        ("a.tsv", "x 1.mp4\tcat\n", [("x 1.mp4", "cat")]),
        ("a.txt", '"a, b.mp4" 3\n', [("a, b.mp4", "3")]),
        ("a.txt", "x/my video.mp4 3\n\nx/2.mp4 11\n", [("x/my video.mp4", "3"), ("x/2.mp4", "11")]),
    ],
)
def test_tables(tmp_path, name, text, expected):
    file = tmp_path / name
    file.write_text(text)
    expected = expected or [("100218", "Doing other things, twice"), ("24413", "Swiping Left")]
    assert read_video_list(str(file)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "lists no videos"),
        ("a.csv", "path,label\n", "lists no videos"),
        ("a.csv", "path,label\na.mp4,cat\nb.mp4\n", r"row 2: 'b\.mp4' is not a video and its label"),
        ("a.csv", "clip,label\nB/1.avi,B\n", r"columns \['clip', 'label'\], of which none .* the videos: .*'path'"),
        ("a.csv", "path,kind\nB/1.avi,B\n", r"columns \['path', 'kind'\], of which none .* the labels: .*'label'"),
        ("t.csv", "youtube_id,time_start,time_end,split\nx,1,10,test\n", "none is known to hold the labels"),
        ("a.csv", "path,label_1\nx/a.mp4,cat\n", "none is known to hold the labels"),
        ("a.csv", "abc,action\ndef,run\n", r"to hold the videos: .* \(Without a header, the first row must have none"),
        ("a.txt", "a.mp4\n", r"row 1: 'a\.mp4' is not a video"),
        ("t.csv", "label,youtube_id,time_start,time_end\nx,abc,one,10\n", "row 1: .*abc.* is not a video"),
        ("a.json", "[{", "is not JSON"),
        ("a.json", '[{"id": "1"}]', 'entry 0: .* must have "id" and "template" or "label"'),
        ("a.json", '["1"]', "entry 0"),
    ],
)
def test_what_cannot_be_understood_is_named(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_video_list(str(file))
    assert name in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("a.mp4,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv is not in UTF-8"):
        read_video_list(str(tmp_path / "a.csv"))
