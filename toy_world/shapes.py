"""The shapes of the hard toy world, and how objects are painted: only the pixels that one can touch
are looked at, so that a scene takes two milliseconds."""
import numpy as np

from toy_world import world as easy
from toy_world.world import GRID, OVERSAMPLING, SIDE


def is_inside(shape, dx, dy, r):
    """Which points at (dx, dy) from its centre a shape of radius r contains, as booleans."""
    if shape == "bar":
        return (abs(dx) < r) & (abs(dy) < 0.4 * r)
    if shape == "frame":
        distance = np.maximum(abs(dx), abs(dy))
        return (distance < 0.88 * r) & (distance > 0.5 * r)
    if shape == "moon":
        return (dx ** 2 + dy ** 2 < r ** 2) & ((dx - 0.55 * r) ** 2 + dy ** 2 > (0.8 * r) ** 2)
    if shape == "hourglass":
        return (abs(dx) < abs(dy)) & (abs(dy) < 0.9 * r)
    if shape == "star":                 # five points; 0 at their middle, 1 between them
        phase = np.arctan2(dx, -dy) * 5 / (2 * np.pi)
        between = 2 * abs(phase - phase.round())
        return np.hypot(dx, dy) < r * (1.1 - 0.7 * between)
    if shape == "heart":
        lobes = (abs(dx) - 0.45 * r) ** 2 + (dy + 0.35 * r) ** 2 < (0.5 * r) ** 2
        return lobes | ((dy > -0.35 * r) & (dy < r - 1.35 * abs(dx)))
    return easy.is_inside(shape, dx, dy, r)


def window(center, radius):
    """The pixels of an axis that an object can touch: first, end."""
    reach = 1.3 * radius + 1            # corners are further out than the radius
    return max(0, int(center - reach)), min(SIDE, int(center + reach) + 1)


def paint(pixels, thing, color):
    """Draw an object onto pixels (SIDE, SIDE, 3), in place."""
    (left, right), (top, bottom) = (window(c, thing.radius) for c in (thing.x, thing.y))
    xs, ys = (GRID[OVERSAMPLING * first:OVERSAMPLING * end] - c for first, end, c in
              ((left, right, thing.x), (top, bottom, thing.y)))
    points = is_inside(thing.shape, xs[None], ys[:, None], thing.radius)
    points = points.reshape(bottom - top, OVERSAMPLING, right - left, OVERSAMPLING)
    share = points.mean(axis=(1, 3))[:, :, None]
    part = pixels[top:bottom, left:right]
    part += (color - part) * share
