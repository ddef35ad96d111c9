"""Outlines for synthetic scenes: compact, non-convex, hollow and thin ones."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

FRACTION_BITS = 4  # OpenCV draws with 1/16 pixel


@dataclass(frozen=True)
class Outline:
    """Curves of (x, y) within about the unit circle: filled by the even-odd rule, or drawn with a pen.

    `pen` is the pen's width as a part of the radius, 0 for filled outlines.
    """

    curves: list[np.ndarray]
    pen: float = 0.0


def draw_outline(
    outline: Outline, center: np.ndarray, radius: float, angle: float, size: tuple[int, int]
) -> np.ndarray:
    """Coverage (H, W), uint8 with soft edges, of an outline put in an image of `size` (H, W)."""
    turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    curves = [np.rint((curve @ turn + center) * 2**FRACTION_BITS).astype(np.int32) for curve in outline.curves]
    coverage = np.zeros(size, np.uint8)
    if outline.pen:
        width = max(2, round(outline.pen * radius))
        cv2.polylines(coverage, curves, False, 255, width, cv2.LINE_AA, FRACTION_BITS)
    else:
        cv2.fillPoly(coverage, curves, 255, cv2.LINE_AA, FRACTION_BITS)
    return coverage


def blob(rng: Generator) -> Outline:
    turn = _turn()
    radius = np.full_like(turn, 0.75)
    for wave in range(2, 6):
        radius += rng.normal(0, 0.22 / wave) * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    return Outline([_polar(turn, radius)])


def ellipse(rng: Generator) -> Outline:
    return Outline([_polar(_turn()) * (1, rng.uniform(0.45, 1))])


def box(rng: Generator) -> Outline:
    """A rectangle with round corners, as the superellipse of exponent 6."""
    turn = _turn()
    radius = (np.abs(np.cos(turn)) ** 6 + np.abs(np.sin(turn)) ** 6) ** (-1 / 6)
    return Outline([_polar(turn, 0.85 * radius) * (1, rng.uniform(0.3, 0.9))])


def star(rng: Generator) -> Outline:
    points = int(rng.integers(4, 8))
    radius = np.tile([1.0, rng.uniform(0.35, 0.6)], points)
    return Outline([_polar(np.arange(2 * points) * np.pi / points, radius)])


def crescent(rng: Generator) -> Outline:
    """An arc of the unit circle, closed by an arc through the same ends around another centre."""
    tip, shift = rng.uniform(0.3, 0.8), rng.uniform(0.35, 0.6)
    outer = np.linspace(tip, 2 * np.pi - tip, 60)
    tip_inner = np.arctan2(np.sin(tip), np.cos(tip) - shift)
    inner = np.linspace(2 * np.pi - tip_inner, tip_inner, 60)
    bite = _polar(inner, np.hypot(np.cos(tip) - shift, np.sin(tip))) + (shift, 0)
    return Outline([np.concatenate([_polar(outer), bite])])


def leaf(rng: Generator) -> Outline:
    along = np.linspace(-1, 1, 40)
    half = rng.uniform(0.25, 0.45) * (1 - along**2) ** 1.2
    spine = rng.uniform(-0.35, 0.35) * (1 - along**2)
    edge = np.stack([along, spine + half], 1), np.stack([along, spine - half], 1)[::-1]
    return Outline([np.concatenate(edge)])


def gear(rng: Generator) -> Outline:
    turn = _turn(240)
    teeth = np.tanh(6 * np.cos(int(rng.integers(7, 13)) * turn))
    return Outline([_polar(turn, 0.87 + 0.11 * teeth), _polar(turn, rng.uniform(0.3, 0.5))])


def ring(rng: Generator) -> Outline:
    flat = (1, rng.uniform(0.6, 1))
    return Outline([_polar(_turn()) * flat, _polar(_turn(), rng.uniform(0.6, 0.85)) * flat])


def rod(rng: Generator) -> Outline:
    along = np.linspace(-1, 1, 30)
    return Outline([np.stack([along, rng.uniform(-0.4, 0.4) * along**2], 1)], pen=rng.uniform(0.05, 0.12))


def spiral(rng: Generator) -> Outline:
    along = np.linspace(0.15, 1, 160)
    return Outline([_polar(along * 2 * np.pi * rng.uniform(1.8, 3), along)], pen=rng.uniform(0.06, 0.11))


def crack(rng: Generator) -> Outline:
    """A random walk across the circle, with branches."""
    trunk = _walk(rng, np.array([-1.0, 0.0]), 0.0, 40)
    curves = [trunk]
    for start in rng.integers(6, 36, size=int(rng.integers(2, 5))):
        curves.append(_walk(rng, trunk[start], rng.choice([-1, 1]) * rng.uniform(0.5, 1.2), int(rng.integers(6, 16))))
    return Outline(curves, pen=rng.uniform(0.015, 0.035))


SHAPES: dict[str, Callable[[Generator], Outline]] = {
    shape.__name__: shape for shape in (blob, ellipse, box, star, crescent, leaf, gear, ring, rod, spiral, crack)
}


def _turn(points: int = 120) -> np.ndarray:
    return np.linspace(0, 2 * np.pi, points, endpoint=False)


def _polar(angle: np.ndarray, radius: np.ndarray | float = 1.0) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _walk(rng: Generator, start: np.ndarray, heading: float, steps: int) -> np.ndarray:
    headings = heading + 0.55 * rng.standard_normal(steps)
    return np.concatenate([[start], start + np.cumsum(0.05 * _polar(headings), axis=0)])
