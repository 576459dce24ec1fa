"""Where pictures come from: a family of sources, chosen in params by `kind`.

Importing this package makes the family complete.
"""

from pipelines.data.sources.base import Catalog, Item, Part, Source
from pipelines.data.sources.digits import Digits
from pipelines.data.sources.image_folder import ImageFolder
from pipelines.data.sources.parquet import Parquet
from pipelines.data.sources.tars import Tars

__all__ = ["Catalog", "Digits", "ImageFolder", "Item", "Parquet", "Part", "Source", "Tars"]
