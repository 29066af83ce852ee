"""What an analysis of weather stations imports from a folder of its own (PYTHONPATH)."""

NAMES = ("Aasen", "Berlin", "Como", "Dax", "Ebro", "Fes", "Genk", "Hof")


def elevation(name: str) -> int:
    return sum(map(ord, name)) % 900
