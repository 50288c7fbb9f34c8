"""The version, from the installed package's metadata or, in a source tree, from the extension."""


def version() -> str:
    from importlib import metadata

    try:
        return metadata.version("ferrotune")
    except metadata.PackageNotFoundError:
        pass
    try:
        from ._native import __version__
    except ImportError:
        return "0+unbuilt"
    return __version__
