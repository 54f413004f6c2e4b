"""Units of measure: symbols with every SI prefix, names, and what a symbol can't be told apart from."""
from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

Unit = tuple[str, Fraction]
"""(dimension, factor to its base unit)"""

_PREFIXES = {"p": "1e-12", "n": "1e-9", "µ": "1e-6", "u": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9",
             "T": "1e12"}
_PREFIX_NAMES = {"pico": "1e-12", "nano": "1e-9", "micro": "1e-6", "milli": "1e-3", "centi": "1e-2", "deci": "0.1", "": "1",
                 "hecto": "100", "kilo": "1e3", "mega": "1e6", "giga": "1e9", "tera": "1e12"}
_PREFIXED = {   # symbol -> dimension, factor; each takes every prefix
    "m": ("length", "1"), "g": ("mass", "1"), "s": ("time", "1"), "L": ("volume", "1e-3"), "l": ("volume", "1e-3"),
    "A": ("current", "1"), "V": ("voltage", "1"), "W": ("power", "1"), "J": ("energy", "1"), "eV": ("electron energy", "1"),
    "Wh": ("energy", "3600"), "cal": ("food energy", "1"), "Hz": ("frequency", "1"), "N": ("force", "1"), "Pa": ("pressure", "1"),
    "bar": ("pressure", "1e5"), "Ω": ("resistance", "1"), "F": ("capacitance", "1"), "H": ("inductance", "1"),
    "T": ("magnetic field", "1"), "C": ("charge", "1"), "mol": ("amount", "1"), "M": ("concentration", "1"),
    "K": ("kelvin", "1"), "S": ("conductance", "1"), "Bq": ("activity", "1"), "Gy": ("dose", "1"), "Sv": ("dose equivalent", "1"),
    "lm": ("luminous flux", "1"), "lx": ("illuminance", "1"),
}
_NOT_MADE = {"pm", "Pm", "M", "T", "G", "Tm", "mM", "mL", "MC", "kM"}   # a clock's pm; letters that are multipliers
_SYMBOLS = {
    "length": "cm:0.01 dm:0.1 in:0.0254 ft:0.3048 yd:0.9144 mi:1609.344 Å:1e-10",
    "mass": "t:1e6 lb:453.59237 lbs:453.59237 oz:28.349523125",
    "time": "sec:1 secs:1 min:60 mins:60 h:3600 hr:3600 hrs:3600 d:86400",
    "volume": "mL:1e-6 cl:1e-5 cL:1e-5 dl:1e-4 dL:1e-4 mm³:1e-9 cm³:1e-6 m³:1 mm^3:1e-9 cm^3:1e-6 m^3:1",
    "area": "mm²:1e-6 cm²:1e-4 m²:1 km²:1e6 mm^2:1e-6 cm^2:1e-4 m^2:1 km^2:1e6 sqft:0.09290304 ha:1e4",
    "speed": "m/s:1 km/s:1000 cm/s:0.01 km/h:5/18 kph:5/18 kmh:5/18 mph:0.44704 ft/s:0.3048",
    "acceleration": "m/s²:1 m/s^2:1",
    "celsius": "°C:1 ℃:1", "fahrenheit": "°F:1 ℉:1", "angle": "°:1",
    "data": "B:1 KB:1e3 kB:1e3 MB:1e6 GB:1e9 TB:1e12 kb:125 Kb:125 Mb:125000 Gb:125000000 Tb:125000000000",
    "concentration": "mM:1e-3", "electric field": "V/m:1", "density": "g/cm³:1 g/cm^3:1 kg/m³:0.001 kg/m^3:0.001",
    "pressure": "hPa:100 mbar:100 mmHg:133.322387415 atm:101325 psi:6894.757293168", "level": "dB:1", "turn rate": "rpm:1",
    "ratio": "%:0.01 pct:0.01", "dollar": "$:1 US$:1 USD:1", "euro": "€:1 EUR:1", "pound sterling": "£:1 GBP:1",
    "rupee": "₹:1 INR:1", "yen": "JPY:1", "yen or yuan": "¥:1", "franc": "CHF:1",
}
_NAMES = {   # singular and plural, case ignored
    "length": "inch:0.0254 foot:0.3048 yard:0.9144 mile:1609.344", "mass": "kilo:1000 ounce:28.349523125 tonne:1e6",
    "time": "minute:60 hour:3600 day:86400 week:604800", "angle": "degree:1 deg:1",
    "celsius": "celsius:1", "fahrenheit": "fahrenheit:1", "ratio": "percent:0.01 per cent:0.01",
    "dollar": "dollar:1", "euro": "euro:1", "rupee": "rupee:1", "yen": "yen:1",
    "area": "square meter:1 square metre:1 square kilometer:1e6 square kilometre:1e6 square centimeter:1e-4 "
            "square centimetre:1e-4 square foot:0.09290304 hectare:1e4",
    "volume": "cubic meter:1 cubic metre:1 cubic centimeter:1e-6 cubic centimetre:1e-6",
    "speed": "meters per second:1 metres per second:1 kilometers per hour:5/18 kilometres per hour:5/18 miles per hour:0.44704",
}
_PREFIXED_NAMES = {
    "meter": ("length", "1"), "metre": ("length", "1"), "gram": ("mass", "1"), "gramme": ("mass", "1"), "second": ("time", "1"),
    "liter": ("volume", "1e-3"), "litre": ("volume", "1e-3"), "joule": ("energy", "1"), "watt": ("power", "1"),
    "volt": ("voltage", "1"), "ampere": ("current", "1"), "amp": ("current", "1"), "ohm": ("resistance", "1"),
    "hertz": ("frequency", "1"), "newton": ("force", "1"), "pascal": ("pressure", "1"), "kelvin": ("kelvin", "1"),
    "electronvolt": ("electron energy", "1"), "electron volt": ("electron energy", "1"), "byte": ("data", "1"),
    "bit": ("data", "1/8"),
    "farad": ("capacitance", "1"), "henry": ("inductance", "1"), "tesla": ("magnetic field", "1"), "coulomb": ("charge", "1"),
    "mole": ("amount", "1"), "molar": ("concentration", "1"),
}
_IRREGULAR = {"inches": "inch", "feet": "foot", "square feet": "square foot", "henries": "henry"}
UNSURE = frozenset({"angle", "celsius", "fahrenheit", "kelvin"})   # "25 degrees" may be any of them, and 0 °C is 32 °F


def _factor(text: str) -> Fraction:
    return Fraction(text)


def _table(source: dict[str, str]) -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for dimension, text in source.items():
        name = ""
        for item in text.split():   # names may hold blanks: what has no factor belongs to the next one
            head, colon, factor = item.rpartition(":")
            name = f"{name} {head if colon else item}".strip()
            if colon:
                table[name], name = (dimension, _factor(factor)), ""
    return table


BY_SYMBOL = {prefix + symbol: (dimension, _factor(factor) * _factor(times))
             for symbol, (dimension, factor) in _PREFIXED.items() for prefix, times in _PREFIXES.items()
             if prefix + symbol not in _NOT_MADE} | _table(_SYMBOLS)
BY_NAME = {prefix + name: (dimension, _factor(factor) * _factor(times))
           for name, (dimension, factor) in _PREFIXED_NAMES.items() for prefix, times in _PREFIX_NAMES.items()} | _table(_NAMES)
_FOLDED: dict[str, set[Unit]] = {}
for _symbol, _unit in BY_SYMBOL.items():
    _FOLDED.setdefault(_symbol.casefold(), set()).add(_unit)


@lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit | None:
    """The unit of a symbol as it is written, of a symbol in other cases if that is the only one so spelled (KG, ghz), or of
    a name. mW, MW and Mw stay three different things: the last is none.
    """
    text = text.replace("μ", "µ").replace("Ω", "Ω")
    if text in BY_SYMBOL:
        return BY_SYMBOL[text] if text != "ML" else None   # on a bottle it is a millilitre, in a reservoir a million litres
    name = " ".join(text.casefold().split()).removeprefix("degrees ").removeprefix("degree ")
    name = _IRREGULAR.get(name, name)
    named = BY_NAME.get(name) or (BY_NAME.get(name[:-1]) if name.endswith("s") else None)
    if named:
        return named
    folded = _FOLDED.get(text.casefold(), set())
    return next(iter(folded)) if len(folded) == 1 and len(text) > 1 and text.casefold() not in ("pm", "am", "ml", "cal") else None


def same_noun(a: str, b: str) -> bool:
    """Whether two unknown units are one word, singular or plural. Short ones must agree in case: Mb is not MB."""
    if a == b:
        return True
    return min(len(a), len(b)) > 3 and a.casefold().removesuffix("s") == b.casefold().removesuffix("s")
