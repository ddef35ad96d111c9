"""Pictures of what the numbers say: overlays, comparisons, training curves."""

from sam_cache.pictures.comparison import comparison
from sam_cache.pictures.curves import draw_curves
from sam_cache.pictures.files import save_png
from sam_cache.pictures.overlay import draw_overlay

__all__ = ["comparison", "draw_curves", "draw_overlay", "save_png"]
