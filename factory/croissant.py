"""Croissant metadata (MLCommons, version 1.0) of a packed data set: what its shards and its manifest hold, in JSON-LD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.storage import digest_file
from factory.pack import MANIFEST
from factory.provenance import licences, provenance
from factory.recipe import FactoryRecipe

_OWN = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format"),
    *("includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
"""Croissant's words that the context maps to its vocabulary: without them a reader finds no record set."""
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{word: f"cr:{word}" for word in _OWN},
}
"""The standard one of version 1.0."""

_ENCODINGS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def croissant(folder: Path, shards: dict[str, str], count: int, name: str, recipe: FactoryRecipe) -> dict[str, Any]:
    """Croissant 1.0 (JSON-LD): the pictures in the shards as a file set, the manifest and the pictures with their texts as record sets, the
    models that the samples come from."""
    fields, parts = ("id", "shard", "prompt", "picture_kind"), provenance(recipe, folder)
    kind = recipe.make.picture_kind
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": f"{count} pictures with texts in WebDataset shards",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **({"license": bound} if (bound := licences(parts)) else {}),
        "isBasedOn": [
            {
                "@type": "sc:CreativeWork",
                "name": one.name,
                "version": one.mark,
                "description": one.part,
                **({"license": one.licence} if one.licence else {}),
                **({"url": one.url} if one.url else {}),
            }
            for one in parts
        ],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "manifest",
                "name": "manifest",
                "contentUrl": MANIFEST,
                "encodingFormat": "application/x-parquet",
                "sha256": digest_file(folder / MANIFEST),
            },
            *(
                {
                    "@type": "cr:FileObject",
                    "@id": shard,
                    "name": shard,
                    "contentUrl": shard,
                    "encodingFormat": "application/x-tar",
                    "sha256": digest,
                }
                for shard, digest in shards.items()
            ),
            {
                "@type": "cr:FileSet",
                "@id": "picture-files",
                "name": "picture-files",
                "containedIn": [{"@id": shard} for shard in shards],
                "encodingFormat": _ENCODINGS[kind],
                "includes": f"*.{kind}",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"samples/{field}",
                        "name": field,
                        "dataType": "sc:Text",
                        "source": {"fileObject": {"@id": "manifest"}, "extract": {"column": field}},
                    }
                    for field in fields
                ],
            },
            {
                "@type": "cr:RecordSet",
                "@id": "pictures",
                "name": "pictures",
                "description": "each picture with its text, which its .txt in the shard holds too",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": "pictures/id",
                        "name": "id",
                        "dataType": "sc:Text",
                        "source": {
                            "fileSet": {"@id": "picture-files"},
                            "extract": {"fileProperty": "filename"},
                            "transform": {"regex": "([0-9a-f]{64})"},
                        },
                        "references": {"fileObject": {"@id": "manifest"}, "extract": {"column": "id"}},
                    },
                    {
                        "@type": "cr:Field",
                        "@id": "pictures/image",
                        "name": "image",
                        "dataType": "sc:ImageObject",
                        "source": {"fileSet": {"@id": "picture-files"}, "extract": {"fileProperty": "content"}},
                    },
                    {
                        "@type": "cr:Field",
                        "@id": "pictures/text",
                        "name": "text",
                        "dataType": "sc:Text",
                        "source": {"fileObject": {"@id": "manifest"}, "extract": {"column": "prompt"}},
                    },
                ],
            },
        ],
    }
