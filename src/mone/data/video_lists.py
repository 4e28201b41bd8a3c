# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Files that list videos with their labels, in the formats that data sets are published in."""

import csv
import json
import re
from pathlib import Path


PATH_COLUMNS = (
    *("path", "video", "video_path", "clip_path", "file_path", "filepath", "file_name", "filename", "file"),
    *("id", "video_id"),
)
KINETICS_COLUMNS = {"youtube_id", "time_start", "time_end"}
LABEL_COLUMNS = ("label", "class", "template", "action")


def read_video_list(path: str) -> list[tuple[str, str]]:
    """(name of the video, label) for each row of a list.

    Understood are, told by their content:

    - Something-Something-v2, `something-something-v2-train.json`: objects with "id" and "template" (or "label"). The
      template's brackets are removed, as in `labels.json`.
    - Kinetics, `train.csv`: columns label, youtube_id, time_start, time_end. The name is that of the clips that its
      download tools write, `<youtube_id>_<start>_<end>` with six digits each.
    - csv with a header that names a column of paths ("path", "video", "file_name", "id", ...) and one of labels.
    - Lines without a header, "path;label" (Something-Something-v1), "path,label", or separated by a tab or the last
      space (Kinetics lists of other codebases).

    Raises:
        ValueError: names the file, and the row where one cannot be understood.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}.") from error
    rows = _read_json(path, text) if file.suffix == ".json" else _read_lines(path, text)
    if not rows:
        raise ValueError(f"{path} lists no videos.")
    return rows


def _read_json(path: str, text: str) -> list[tuple[str, str]]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    rows = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        label = entry.get("template", entry.get("label")) if isinstance(entry, dict) else None
        if label is None or "id" not in entry:
            raise ValueError(f'{path}, entry {number}: {entry!r:.100} must have "id" and "template" or "label".')
        rows.append((str(entry["id"]), str(label).replace("[", "").replace("]", "")))
    return rows


def _read_lines(path: str, text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return []
    unquoted = re.sub(r'"[^"]*"', "", lines[0])
    separator = next((character for character in ";\t," if character in unquoted), " ")
    if separator == " ":
        table = [[part.strip('"') for part in line.rsplit(maxsplit=1)] for line in lines]
    else:
        table = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    header = {name.strip().lower(): column for column, name in enumerate(table[0])}
    path_column = next((header[name] for name in PATH_COLUMNS if name in header), None)
    label_column = next((header[name] for name in LABEL_COLUMNS if name in header), None)
    is_kinetics = header.keys() >= KINETICS_COLUMNS
    names_videos = path_column is not None or is_kinetics
    if names_videos != (label_column is not None):
        # Taken for a list without a header, each video would be a class. But a class may be called "action" where a
        # file is named beside it, with a dot, a folder or a number.
        lacking, known = ("labels", LABEL_COLUMNS) if names_videos else ("videos", PATH_COLUMNS)
        if names_videos or not re.search(r"[\d./\\]", "".join(table[0])):
            raise ValueError(
                f"{path} has the columns {table[0]}, of which none is known to hold the {lacking}: call it one of "
                f"{known}. (Without a header, the first row must have none of these names.)"
            )
    if not names_videos:
        header, path_column, label_column = {}, 0, 1

    rows = []
    for number, row in enumerate(table[1:] if header else table, start=1):
        try:
            if is_kinetics:
                start, end = (float(row[header[name]]) for name in ("time_start", "time_end"))
                name = f"{row[header['youtube_id']]}_{start:06.0f}_{end:06.0f}"
            else:
                name = row[path_column].strip()
            rows.append((name, row[label_column].strip()))
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{path}, row {number}: {separator.join(row)!r:.100} is not a video and its label."
            ) from error
    return rows
