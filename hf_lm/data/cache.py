"""
The cache of `datasets` for tables of our own. It stands alone because `datasets` replaces `open`, `Path` and the like in
the module of a builder by its own, which take some file names for addresses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets
import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, Dataset, DatasetInfo, Features, SplitGenerator
from datasets.builder import Key
from datasets.exceptions import DatasetGenerationError

from ..errors import InputError


@dataclass
class TablesConfig(BuilderConfig):
    """What is written."""

    tables: Callable[[], Iterator[pa.Table]] | None = None
    features: Features | None = None
    notes: list[str] | None = None


class Tables(ArrowBasedBuilder):
    """Writes tables to the cache: locked, and renamed only when they are complete."""

    BUILDER_CONFIG_CLASS = TablesConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        return [SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        for number, table in enumerate(self.config.tables()):
            yield Key(0, number), table
        self.info.description = "\n".join(self.config.notes or ())


def cached(
    name: str,
    key: str,
    tables: Callable[[], Iterator[pa.Table]],
    features: Features | None = None,
    notes: list[str] | None = None,
) -> Dataset:
    """
    The rows of some tables, from the cache if they are there.

    Args:
        key: a hash of all that the tables depend on; also the fingerprint of the result.
        features: default: those of the first table.
        notes: lines that `tables` adds to while they are written; cached as `info.description` of the result.

    Raises:
        InputError: what `tables` raises; nothing is cached.
    """
    builder = Tables(dataset_name=name, config_id=key, tables=tables, features=features, notes=notes)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises: one line is enough
    try:
        builder.download_and_prepare()
        rows = builder.as_dataset(split="train")
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    finally:
        datasets.logging.set_verbosity(verbosity)
    rows._fingerprint = key
    return rows
