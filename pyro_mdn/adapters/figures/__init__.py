r"""Figures, and the only importers of matplotlib; :mod:`pyro_mdn.plots` is their public face."""
