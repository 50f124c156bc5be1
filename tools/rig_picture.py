"""Whether a rig's calibration, times and labels agree: the sanity picture, and how well boxes fit the points in them.

    python tools/rig_picture.py --synthetic 7 40 --out rig.png
    python tools/rig_picture.py --nuscenes ../shared/data/nuscenes_sample/frame.json --out rig.png
    python tools/rig_picture.py --kitti ../shared/data/kitti_mini/training 000001 --out rig.png

Prints a JSON line for each camera: how many points fall into its picture, and `iou`, over boxes that are whole in it and
hold at least --points of them: the outline of the box in the picture and the convex hull of its points there, overlap
by union, mean. It says how tightly boxes fit what the LiDAR measured; it stays below 1 where all is right, since a LiDAR
sees two sides at most, and little of glass. Whether the camera agrees, the picture shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from edgekit.rig import RigFrame, corners, in_picture, inside
from edgekit.rig_files import read_kitti, read_nuscenes
from edgekit.synth.street_rig import RigWorld
from edgekit.tasks.fusion.draw import draw


def overlap(frame: RigFrame, name: str, box: np.ndarray, least: int) -> float | None:
    """IoU of one box in one picture; None where it does not show whole or holds too few points."""
    camera = frame.rig.cameras[name]
    uv, depth = frame.project(name, corners(box[None])[0])
    if not in_picture(camera, uv, depth).all():
        return None
    spots, _ = frame.project(name, frame.points[inside(frame.points, box)])
    if len(spots) < least:
        return None
    outline, hull = (cv2.convexHull(points.astype(np.float32)) for points in (uv, spots))
    both, _ = cv2.intersectConvexConvex(outline, hull)
    return both / (cv2.contourArea(hull) + cv2.contourArea(outline) - both)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--synthetic", nargs=2, type=int, metavar=("SEED", "FRAME"))
    which.add_argument("--nuscenes", type=Path, metavar="FILE")
    which.add_argument("--kitti", nargs=2, metavar=("FOLDER", "NAME"))
    parser.add_argument("--out", type=Path, help="where the picture goes")
    parser.add_argument("--width", type=int, default=640, help="of each camera's picture")
    parser.add_argument("--bare", action="store_true", help="no points on the pictures")
    parser.add_argument("--points", type=int, default=20)
    args = parser.parse_args()
    if args.synthetic:
        frame = RigWorld(args.synthetic[0]).frame(args.synthetic[1])
    elif args.nuscenes:
        frame = read_nuscenes(args.nuscenes)
    else:
        frame = read_kitti(*args.kitti)
    boxes = frame.truth.boxes if frame.truth is not None else np.zeros((0, 9), np.float32)
    for name, camera in frame.rig.cameras.items():
        found = [each for box in boxes if (each := overlap(frame, name, box, args.points)) is not None]
        line: dict[str, object] = {
            "camera": name,
            "points": int(in_picture(camera, *frame.project(name, frame.points)).sum()),
        }
        line["boxes"] = len(found)
        if found:
            line["iou"] = round(float(np.mean(found)), 3)
        print(json.dumps(line))
    if args.out:
        cv2.imwrite(str(args.out), draw(frame, width=args.width, points=not args.bare))


if __name__ == "__main__":
    main()
