"""Where the demo's files come from, and what each one truly is.

Every file belongs to a package that is pinned here and read from the running environment. The
packages are read as files and never imported, so none of them needs its own dependencies.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

MAGIKA = "1.0.3"

# distribution -> version, and the file types that it is there for. All permissively licensed.
# None has a pytest plug-in or is an optional import of our dependencies (as matplotlib is of
# torchmetrics), so that installing them without their dependencies breaks nothing.
DISTRIBUTIONS: dict[str, str] = {
    "acme": "5.9.0",  # pem, der
    "astropy": "8.0.2",  # C, XML, shared objects, gzip; FITS
    "bokeh": "3.9.2",  # TypeScript, JSON
    "certbot": "5.8.0",  # pem
    "cmake": "4.4.4",  # CMake, reStructuredText
    "cwltool": "3.3.20260925135507",  # YAML, Markdown
    "diskimage-builder": "3.43.0",  # YAML, shell, reStructuredText
    "distlib": "0.4.4",  # Windows executables
    "Django": "5.2.19",  # gettext, HTML, JavaScript
    "django-countries": "9.1.0",  # GIF
    "django-jazzmin": "3.0.5",  # CSS, fonts
    "django-js-lib-bootstrap-icons": "1.11.3.0",  # SVG
    "Flask-Admin": "2.2.1",  # SVG, SCSS, fonts; LESS
    "font-source-sans-pro": "0.0.1",  # TrueType
    "googleapis-common-protos": "1.76.0",  # protocol buffers
    "gymnasium": "1.4.0",  # PNG, XML
    "icalendar": "7.3.0",  # calendars
    "jupyter-server-mathjax": "0.2.6",  # JavaScript, WOFF
    "libpysal": "4.14.1",  # CSV, GeoPackage; shapefiles, dBASE
    "lifelines": "0.30.3",  # CSV
    "nibabel": "5.4.2",  # DICOM, gzip; PAR/REC
    "pettingzoo": "1.27.0",  # PNG
    "pyccel": "2.0.1",  # C, Fortran
    "pydicom": "3.0.2",  # DICOM
    "pyfiglet": "1.0.4",  # FIGlet fonts
    "pynwb": "4.2.0",  # YAML, PDF, PowerPoint
    "python-for-android": "2026.5.9",  # patches, Java, makefiles
    "pythran": "0.19.0",  # C++
    "rdata": "1.1.0",  # R data
    "schema-salad": "8.10.20260825112551",  # YAML, Java, C#
    "Sphinx": "9.0.4",  # JavaScript, LaTeX, TOML
    "tzdata": "2026.6",  # time zones
    "vispy": "0.17.0",  # shared objects; GLSL
    "XStatic-bootswatch": "3.3.7.1",  # CSS, SCSS; LESS
    "XStatic-jquery-ui": "1.13.0.2",  # PNG, CSS
}

# Extension -> magika label, where the extension settles the type. Left out because it does not:
# .txt (anything), .h (C, C++, Objective-C), .map (source maps, linker scripts), .v (Verilog, ECAT
# volumes), .crt and .key (PEM or DER), .conf, .in, .dat, and templates (.j2, .jinja, .hbs: two
# languages in one file).
TRUTH: dict[str, str] = {
    **{".bash": "shell", ".sh": "shell", ".bat": "batch", ".ps1": "powershell"},
    **{".bib": "bib", ".tex": "latex", ".sty": "latex", ".md": "markdown", ".rst": "rst"},
    **{".c": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cs": "cs"},
    **{".cfg": "ini", ".ini": "ini", ".json": "json", ".toml": "toml", ".yaml": "yaml"},
    **{".yml": "yaml", ".csv": "csv", ".tsv": "tsv", ".xml": "xml", ".html": "html"},
    **{".cmake": "cmake", ".mk": "makefile", ".gradle": "gradle", ".m4": "m4"},
    **{".css": "css", ".scss": "scss", ".js": "javascript", ".mjs": "javascript"},
    **{".ts": "typescript", ".java": "java", ".lua": "lua", ".rb": "ruby", ".tcl": "tcl"},
    **{".py": "python", ".pyi": "python", ".f": "fortran", ".f90": "fortran", ".sql": "sql"},
    **{".diff": "diff", ".patch": "diff", ".ics": "ics", ".po": "po", ".proto": "proto"},
    **{".pem": "pem", ".der": "crt", ".dcm": "dicom", ".pdf": "pdf", ".pptx": "pptx"},
    **{".gif": "gif", ".ico": "ico", ".jpeg": "jpeg", ".jpg": "jpeg", ".png": "png"},
    **{".svg": "svg", ".tiff": "tiff", ".webp": "webp", ".mp3": "mp3", ".ogg": "ogg"},
    **{".wav": "wav", ".otf": "otf", ".ttf": "ttf", ".woff": "woff", ".woff2": "woff2"},
    **{".bz2": "bzip", ".gz": "gzip", ".tgz": "gzip", ".xz": "xz", ".zip": "zip"},
    **{".whl": "zip", ".exe": "pebin", ".gpkg": "sqlite", ".hdf5": "h5"},
    **{".npy": "npy", ".npz": "npz", ".parquet": "parquet"},
    **({".so": "elf"} if sys.platform == "linux" else {}),  # elsewhere .so is not an ELF file
}

# Labels whose files are often templates of another language: then the extension names what the
# template renders to, and the file itself has no single true type.
TEMPLATED = frozenset({"gradle", "html", "rst", "xml"})


@dataclass(frozen=True, slots=True)
class Strange:
    """A file type outside magika's labels: extensions, and the bytes every such file starts with.

    The bytes matter: an .rds file may be gzip outside, and a .flf file a zip archive, and those
    are known types. An empty ``starts`` accepts all (source text without a signature).
    """

    suffixes: tuple[str, ...]
    starts: tuple[bytes, ...] = ()


STRANGE: dict[str, Strange] = {
    "dbase": Strange((".dbf",), (b"\x03",)),
    "figlet": Strange((".flf",), (b"flf2",)),
    "fits": Strange((".fits",), (b"SIMPLE  =",)),
    "gettext-mo": Strange((".mo",), (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde")),
    "glsl": Strange((".glsl", ".vert", ".frag")),
    "less": Strange((".less",)),
    "parrec": Strange((".par",), (b"# === DATA DESCRIPTION FILE",)),
    "rdata": Strange((".rda", ".rds"), (b"RDA", b"RDX", b"RDB", b"A\n", b"B\n", b"X\n")),
    "shapefile": Strange((".shp", ".shx"), (b"\x00\x00\x27\x0a",)),
    "tzif": Strange(("",), (b"TZif",)),
}


def requirements() -> tuple[str, ...]:
    """What the demo reads, as pip requirements. Install them with ``pip install --no-deps``."""
    return (f"magika=={MAGIKA}", *(f"{name}=={version}" for name, version in DISTRIBUTIONS.items()))
