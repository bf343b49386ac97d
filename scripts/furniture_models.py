# SPDX-License-Identifier: Apache-2.0
"""Which models of Debian's furniture libraries the rooms are furnished with, and under which licences they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

LIBRARIES = {
    "K": "KatorLegaz",
    "0": "BlendSwap-CC-0",
    "B": "BlendSwap-CC-BY",
    "R": "Reallusion",
    "S": "Scopia",
}
LICENCES = {
    "K": ("CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"),
    "0": ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "B": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
    "R": ("CC BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"),
    "S": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
}
# The class is our own plain word for the thing; the models are LIBRARY:identifier in the catalogue.
MODELS = {
    "chair": "K:dining-chair K:cafe-chair 0:oakChair 0:plasticChair 0:chairWithCushion 0:chair2 0:osakaChair "
    "B:cafe_set_tonon_chair B:ella_chair_f B:plaidChair B:kitchenChair B:chair3 S:chair3 S:chair S:plastic_chair "
    "S:white_kitchen_chair",
    "armchair": "0:armchair2 0:winchesterArmchair B:armchair1 B:fotel S:armchair S:armchair2 K:mid-century-chair "
    "S:rattanArmchair S:armchair3 B:armChair2",
    "office chair": "K:office-chair S:office_chair S:kids_desk_chair",
    "stool": "K:bar-stool 0:silla2 0:stool2 B:green_stool S:kitchen_stool S:bar_chair",
    "sofa": "K:futon-couch K:mid-century-sofa 0:couch 0:sofa2 0:winchesterSofa B:sofa2 B:sofa3 B:couch3 S:simple_sofa "
    "S:beige_sofa S:burlap_sofa S:leather_sofa",
    "bench": "K:bench 0:bench K:painted-bench K:concrete-bench",
    "table": "K:glass-dining-table K:folding-table 0:oakTable 0:tableWithTablecloth 0:table B:table S:black_table "
    "S:table4 S:round-table S:table-on-trestles B:cafe_set_mota_table S:white_kitchen_table",
    "coffee table": "B:coffeeTable S:saloon_table S:living_room_table S:table_wood_and_iron S:coffee-table2",
    "desk": "0:desk B:biurko3 B:simpleDesk B:officeTable S:kids_wooden_desk S:kids_desk_table",
    "bed": "0:bed1 0:bed2 0:bed3 0:bedWithTexture B:lettoCloud B:juniorBed S:bed1 S:children_bed "
    "S:captains-bed S:iron_bed",
    "crib": "S:crib 0:babyRockingBed",
    "wardrobe": "0:wardrobeWithSlidingDoors B:wardrobe B:wardrobe2 S:wardrobe1",
    "bookshelf": "K:full-bookcase 0:bookcase B:bookcase S:kids_shelves 0:verticalShelves 0:shelves K:utility-shelving",
    "cabinet": "0:lowerCabinet 0:drawersCabinet B:kitchenLowerCabinet B:kitchenDrawersCabinet B:dresserWithDrawers "
    "K:filing-cabinet 0:highCabinet",
    "nightstand": "0:bedsideTable2 B:bedsideTable",
    "tv stand": "B:tvStand",
    "television": "0:led_tv S:tv S:wall-flat-tv",
    "refrigerator": "K:fridge 0:refrigerator 0:largeFridge",
    "washing machine": "B:washing_machine S:clothes_washing_machine",
    "oven": "0:oven 0:doubleOven B:largeStove",
    "sink": "B:kitchenSink 0:sinkCabinet 0:washbasin B:washbasin_jay_hardy 0:modernVanity",
    "toilet": "0:toiletsUnit B:toilets_unit_jay_hardy B:modernToilet",
    "bathtub": "B:bath_jay_hardy S:islandBath S:corner_bathtub",
    "piano": "0:pianoAQueue B:piano",
    "fireplace": "S:fireplace1 S:fireplace2",
    "radiator": "0:radiator 0:radiator1 0:radiator3 B:modernRadiator",
    "trash can": "K:bullet-trash-can K:residential-trashcan 0:dustbin K:park-trashcan",
    "lamp": "0:desklamp K:pedestal-vase-lamp S:desk_lamp1 S:desk_lamp2 S:little_lamp1 S:little_lamp2 S:little_lamp3 "
    "S:livingroom_lamp1 B:lamp S:living_lamp",
    "plant": "0:decorativePlant 0:plant B:mediumIndoorPlant B:spatifilum B:yuccaPlant S:maceta S:ficus 0:littlePlant "
    "B:succulentPlant S:bonsai-tree 0:cactus B:decorativePlant",
    "christmas tree": "S:christmas_tree",
    "vase": "S:vase1 S:vase2 S:vase3 S:jar S:old_jar",
    "mug": "K:coffee-mug 0:beerGlass S:cup",
    "book": "B:book",
    "laptop": "B:laptop K:apple-ibook-2001",
    "computer": "K:apple-imac-1998 S:apple_pc",
    "printer": "S:inkjet_and_scanner_printer",
    "phone": "S:phone B:wirelessOfficePhone3",
    "microwave": "B:microwave",
    "toaster": "S:toaster",
    "coffee maker": "K:coffee-maker 0:coffeeBrewer S:coffee_machine",
    "mixer": "0:kitchenaid",
    "teapot": "S:teapot B:boiler B:espressokettle",
    "bowl": "K:bowl S:bowl S:bowlWithFruits S:bowlWithSalad S:apples",
    "bottle": "S:wine_bottle K:red-wine-bottle-01 B:beer_bottle 0:yogurtBottle",
    "fan": "0:tableFan",
    "teddy bear": "0:teddyBear",
    "ball": "0:basketball B:ballonFoot",
    "guitar": "0:electricGuitar",
    "speaker": "0:speaker2 0:speaker3",
    "radio": "B:radio",
    "aquarium": "S:aquarium",
    "backpack": "B:backpack",
    "suitcase": "B:suitcase",
    "box": "0:crate S:cardboard-box S:open-cardboard-box 0:box",
    "bicycle": "B:bike S:bicycle",
    "fire extinguisher": "0:fireExtinguisher",
    "water cooler": "S:water_cooler",
    "ladder": "S:step-ladder-metal S:step-ladder-wood",
    "stroller": "S:stroller",
    "wheelchair": "B:wheelchair",
    "barrel": "0:barrel",
    "cat": "S:cat B:siameseCat",
    "dog": "S:dog B:bulldog",
    "person": "K:male-01-suit K:female-01-casual-clothing R:female01 R:female02 R:male01 R:male03",
    "door": "S:door S:puerta K:exterior-door-01 K:exterior-door-02 K:exterior-door-05 K:exterior-door-07",
    "window": "K:window-01 K:window-08 S:turn-window S:window_2x3_regular S:window_2x1_medium_with_large_pane",
}
# Things whose flat top carries small objects.
SUPPORTS = {
    "table",
    "coffee table",
    "desk",
    "nightstand",
    "cabinet",
    "tv stand",
    "washing machine",
    "bookshelf",
    "bench",
    "wardrobe",
}


def held_out(identifiers: list[str]) -> set[str]:
    """About a fifth of the models of a class with three or more, by a hash of the name: never in training rooms."""
    if len(identifiers) < 3:
        return set()
    order = sorted(identifiers, key=lambda i: hashlib.sha256(f"held out {i}".encode()).hexdigest())
    return set(order[: max(1, round(0.2 * len(identifiers)))])


def items() -> Iterator[tuple[str, str, str]]:
    for name, models in MODELS.items():
        for model in models.split():
            library, identifier = model.split(":")
            yield name, library, identifier
