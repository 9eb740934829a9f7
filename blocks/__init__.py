"""What is saved once and used by name, as Prefect blocks.

Registered by `prefect block register -m nexa_infra.blocks`, and by the `prefect.collections` entry point
wherever the package is installed beside a server.
"""

from nexa_infra.blocks.catalog import ImageCatalog, ImageTarget
from nexa_infra.blocks.cluster import DataVolume, SlurmCluster
from nexa_infra.blocks.prices import PriceList, PriceRow

__all__ = ["DataVolume", "ImageCatalog", "ImageTarget", "PriceList", "PriceRow", "SlurmCluster"]
