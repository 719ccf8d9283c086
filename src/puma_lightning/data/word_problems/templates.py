"""The templates of the built-in word problems, and the words that fill them.

A question is plain text in which

* ``[has|owns]`` is one of these phrases, chosen for each problem,
* ``{start}`` is a number, from the range of that name in ``numbers``,
* ``{name}``, ``{He}``, ``{he}``, ``{his}`` is a person and ``{friend}`` another one,
* ``{toy}`` and ``{toys}``, ``{box}`` and ``{boxes}``, ... are a noun of that kind, singular and plural (see `NOUNS`),
  and ``{other_toys}`` another noun of the same kind.

A program is one assignment per line, with one operation at most, and the last one is ``result``. Numbers are redrawn
until every value is a whole number of at least 2, so a template need not say that nobody gives away more than there is.
Programs of one and two steps name their numbers first, longer ones write them into the operations and so stay short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PEOPLE = {
    "Ava": "she",
    "Ben": "he",
    "Clara": "she",
    "Dan": "he",
    "Emma": "she",
    "Felix": "he",
    "Grace": "she",
    "Hugo": "he",
    "Ivy": "she",
    "Jack": "he",
    "Kate": "she",
    "Leo": "he",
    "Maya": "she",
    "Noah": "he",
    "Olivia": "she",
    "Paul": "he",
    "Rosa": "she",
    "Sam": "he",
    "Tina": "she",
    "Victor": "he",
}

# By the slots of the singular and the plural.
NOUNS = {
    ("animal", "animals"): {
        "cow": "cows",
        "goat": "goats",
        "horse": "horses",
        "duck": "ducks",
        "pig": "pigs",
        "hen": "hens",
    },
    ("box", "boxes"): {"box": "boxes", "bag": "bags", "basket": "baskets", "crate": "crates"},
    ("flower", "flowers"): {"tulip": "tulips", "rose": "roses", "daisy": "daisies", "lily": "lilies"},
    ("fruit", "fruits"): {
        "apple": "apples",
        "orange": "oranges",
        "pear": "pears",
        "peach": "peaches",
        "lemon": "lemons",
        "mango": "mangoes",
    },
    ("item", "items"): {
        "book": "books",
        "hat": "hats",
        "shirt": "shirts",
        "lamp": "lamps",
        "puzzle": "puzzles",
        "chair": "chairs",
    },
    ("place", "places"): {"park": "parks", "museum": "museums", "zoo": "zoos", "theater": "theaters"},
    ("toy", "toys"): {
        "pencil": "pencils",
        "marble": "marbles",
        "sticker": "stickers",
        "crayon": "crayons",
        "card": "cards",
        "bead": "beads",
        "coin": "coins",
        "shell": "shells",
    },
    ("treat", "treats"): {
        "cookie": "cookies",
        "muffin": "muffins",
        "pie": "pies",
        "donut": "donuts",
        "cupcake": "cupcakes",
    },
}

# What a program may use without a digit in the question, and the words that stand for it there.
CONSTANTS = {
    2: ("twice", "half", "rectangular"),
    4: ("four",),
    7: ("week", "weeks"),
    12: ("dozen", "dozens"),
    100: ("percent",),
}


@dataclass(frozen=True)
class Template:
    """One kind of problem.

    Args:
        name: Decides, with the numbers, which problems are held out; another name means that others are.
        question: Text, in the notation above.
        program: Lines of Python, in the notation above.
        numbers: The values that each number can have.
    """

    name: str
    question: str
    program: str
    numbers: Mapping[str, range]


ONE_STEP = [
    Template(
        "find_more",
        """
        {name} [has|owns|keeps] {start} {toys} [in a drawer|at home|in a bag].
        {He} [finds|buys|gets] {more} more.
        How many {toys} does {name} have [now|in all|altogether]?
        """,
        """
        {toys} = {start}
        more = {more}
        result = {toys} + more
        """,
        {"start": range(10, 200), "more": range(2, 100)},
    ),
    Template(
        "two_kinds_of_animals",
        """
        [There are|A farmer has|You can see] {first} {animals} and {second} {other_animals} [on a farm|in a field].
        How many animals [are there|is that] [altogether|in all|in total]?
        """,
        """
        {animals} = {first}
        {other_animals} = {second}
        result = {animals} + {other_animals}
        """,
        {"first": range(2, 100), "second": range(2, 100)},
    ),
    Template(
        "give_away",
        """
        {name} [has|owns|starts with] {start} {toys}.
        {He} [gives|hands|sends] {given} of them to {friend}.
        How many {toys} does {name} [have left|still have|have now]?
        """,
        """
        {toys} = {start}
        given = {given}
        result = {toys} - given
        """,
        {"start": range(10, 200), "given": range(2, 100)},
    ),
    Template(
        "how_many_more",
        """
        [On Monday|In May|Last year], {name} picked {larger} {fruits} and {friend} [picked|picked only] {smaller}.
        How many more [did|{fruits} did] {name} pick than {friend}?
        """,
        """
        first = {larger}
        second = {smaller}
        result = first - second
        """,
        {"larger": range(10, 200), "smaller": range(2, 150)},
    ),
    Template(
        "pages_left",
        """
        {name} is reading a [book|story|novel] [of|with] {pages} pages.
        [So far|By today|By now], {he} has read {read} pages.
        How many pages are left [to read|for {name} to read]?
        """,
        """
        pages = {pages}
        read = {read}
        result = pages - read
        """,
        {"pages": range(50, 400), "read": range(5, 300)},
    ),
    Template(
        "boxes_of_fruit",
        """
        [There are {count} {boxes} in a shop|{name} fills {count} {boxes}|A truck brings {count} {boxes}].
        [Each {box} holds|Every {box} has|In each {box} there are] {each} {fruits}.
        How many {fruits} are there [in all|altogether|in total]?
        """,
        """
        {boxes} = {count}
        {fruits} = {each}
        result = {boxes} * {fruits}
        """,
        {"count": range(2, 80), "each": range(2, 80)},
    ),
    Template(
        "rows_of_flowers",
        """
        [{name} plants|A gardener plants|In a garden there are] {rows} rows of {flowers}.
        [Each|Every] row has {each} {flowers}.
        How many {flowers} [is that|are there] [in all|altogether|in total]?
        """,
        """
        rows = {rows}
        {flowers} = {each}
        result = rows * {flowers}
        """,
        {"rows": range(2, 80), "each": range(2, 80)},
    ),
    Template(
        "share_equally",
        """
        [{name}|A teacher|A club] [shares|divides] {total} {toys} equally among {children} children.
        How many [{toys} does|does] each [child|of them] [get|receive]?
        """,
        """
        {toys} = {total}
        children = {children}
        result = {toys} / children
        """,
        {"total": range(10, 1000), "children": range(2, 50)},
    ),
    Template(
        "baked_per_hour",
        """
        A [bakery|machine|factory] makes {total} {treats} in {hours} hours, [always at the same speed|without a break].
        How many {treats} does it make [per|in one|every] hour?
        """,
        """
        {treats} = {total}
        hours = {hours}
        result = {treats} / hours
        """,
        {"total": range(20, 1500), "hours": range(2, 30)},
    ),
]

TWO_STEPS = [
    Template(
        "money_left",
        """
        {name} [has|has saved|takes] ${money} and [goes to a shop|goes to a market|goes shopping].
        {He} buys {count} {items} for ${price} each.
        How [many dollars are|much money is] left?
        """,
        """
        money = {money}
        {items} = {count}
        price = {price}
        cost = {items} * price
        result = money - cost
        """,
        {"money": range(20, 500), "count": range(2, 10), "price": range(2, 40)},
    ),
    Template(
        "boxes_and_loose",
        """
        {name} has {count} {boxes} of {fruits}, with {each} {fruits} in [each|every] {box}.
        {He} also has {loose} {fruits} [on a table|in a bowl|in the kitchen].
        How many {fruits} does {name} have [in all|altogether|in total]?
        """,
        """
        {boxes} = {count}
        {fruits} = {each}
        loose = {loose}
        packed = {boxes} * {fruits}
        result = packed + loose
        """,
        {"count": range(2, 20), "each": range(2, 30), "loose": range(2, 40)},
    ),
    Template(
        "eat_and_pack",
        """
        {name} [bakes|makes] {baked} {treats}.
        {His} [family|class|team] eats {eaten} of them, and {he} [packs|puts] the rest into {count} equal {boxes}.
        How many {treats} [are in|go into] [each|every|one] {box}?
        """,
        """
        {treats} = {baked}
        eaten = {eaten}
        {boxes} = {count}
        left = {treats} - eaten
        result = left / {boxes}
        """,
        {"baked": range(20, 200), "eaten": range(2, 60), "count": range(2, 12)},
    ),
    Template(
        "give_twice",
        """
        {name} [has|owns|starts with] {start} {toys}.
        {He} [gives|hands|sends] {first} to {friend} and [loses|sells] {second}.
        How many {toys} does {name} [have left|still have|have now]?
        """,
        """
        {toys} = {start}
        given = {first}
        lost = {second}
        left = {toys} - given
        result = left - lost
        """,
        {"start": range(20, 200), "first": range(2, 80), "second": range(2, 80)},
    ),
    Template(
        "bus_stop",
        """
        [There are|A driver counts|We see] {start} people on a [bus|train|boat].
        At [the next stop|the first stop|a stop], {off} people get off and {on} get on.
        How many people are on it [now|then|after the stop]?
        """,
        """
        people = {start}
        off = {off}
        on = {on}
        stayed = people - off
        result = stayed + on
        """,
        {"start": range(10, 100), "off": range(2, 60), "on": range(2, 60)},
    ),
    Template(
        "times_as_many",
        """
        {name} has {first} {toys} [at home|in a drawer|in a bag], and {friend} has {times} times as many.
        How many {toys} do [they|both|the two] have [together|in all|altogether]?
        """,
        """
        {toys} = {first}
        times = {times}
        more = {toys} * times
        result = {toys} + more
        """,
        {"first": range(5, 400), "times": range(3, 15)},
    ),
    Template(
        "share_together",
        """
        {name} has {first} {treats} and {friend} has {second}.
        They [share|divide] all of [them|these] equally among {children} [children|friends].
        How many does each [get|receive]?
        """,
        """
        first = {first}
        second = {second}
        children = {children}
        {treats} = first + second
        result = {treats} / children
        """,
        {"first": range(5, 100), "second": range(5, 100), "children": range(3, 12)},
    ),
    Template(
        "minutes_every_day",
        """
        {name} [reads|sings|dances] for {minutes} minutes every day.
        How many minutes is that [in all|altogether|in total] [in|over|after] {weeks} weeks?
        """,
        """
        minutes = {minutes}
        weeks = {weeks}
        days = weeks * 7
        result = minutes * days
        """,
        {"minutes": range(5, 100), "weeks": range(2, 52)},
    ),
    Template(
        "dozens_of_eggs",
        """
        A [shop|baker|cook] buys {dozens} dozen eggs.
        {broken} of [the|these] eggs [break|are broken|are bad].
        How many [good eggs are left|eggs are still good]?
        """,
        """
        dozens = {dozens}
        broken = {broken}
        eggs = dozens * 12
        result = eggs - broken
        """,
        {"dozens": range(2, 60), "broken": range(2, 100)},
    ),
]

THREE_STEPS = [
    Template(
        "two_purchases",
        """
        {name} [buys|orders] {first} {items} [for|at] ${first_price} each
        and {second} {other_items} [for|at] ${second_price} each.
        How [much does {name} pay|much does it cost|many dollars is that] [in all|altogether|in total]?
        """,
        """
        {items} = {first} * {first_price}
        {other_items} = {second} * {second_price}
        result = {items} + {other_items}
        """,
        {
            "first": range(2, 20),
            "first_price": range(2, 50),
            "second": range(2, 20),
            "second_price": range(2, 50),
        },
    ),
    Template(
        "class_trip",
        """
        {teachers} teachers and {classes} classes of {students} students each [go to|visit|travel to] a {place}.
        [Each|Every|One] bus [takes|has room for|carries] {seats} people.
        How many buses [do they need|are needed|must they rent]?
        """,
        """
        students = {classes} * {students}
        people = students + {teachers}
        result = people / {seats}
        """,
        {
            "classes": range(2, 12),
            "students": range(15, 35),
            "teachers": range(2, 20),
            "seats": range(12, 60),
        },
    ),
    Template(
        "pay_for_work",
        """
        {name} [works|helps] in a [shop|garden|kitchen] {hours} hours a day for {days} days.
        {He} [earns|gets] ${wage} an hour and [spends|gives away] ${spent}.
        How much [money is left|does {name} have left]?
        """,
        """
        hours = {hours} * {days}
        pay = hours * {wage}
        result = pay - {spent}
        """,
        {
            "hours": range(2, 9),
            "days": range(2, 30),
            "wage": range(5, 30),
            "spent": range(10, 400),
        },
    ),
    Template(
        "sell_the_good_ones",
        """
        A [farmer|shop] has {count} {boxes} with {each} {fruits} [each|in each {box}].
        Of these, {bad} are [bad|rotten|spoiled], and the [rest|others] are sold for ${price} each.
        How many dollars [is that|does this make]?
        """,
        """
        {fruits} = {count} * {each}
        good = {fruits} - {bad}
        result = good * {price}
        """,
        {"count": range(2, 20), "each": range(5, 30), "bad": range(2, 40), "price": range(2, 10)},
    ),
    Template(
        "morning_and_evening",
        """
        Every day, {name} [walks|runs|rides] {morning} miles in the morning and {evening} miles in the evening.
        How many miles is that [in all|altogether|in total] [in|over|after] {weeks} weeks?
        """,
        """
        day = {morning} + {evening}
        week = day * 7
        result = week * {weeks}
        """,
        {"morning": range(2, 16), "evening": range(2, 16), "weeks": range(2, 40)},
    ),
    Template(
        "twice_as_many_pages",
        """
        {name} is reading a [book|story|novel] [of|with] {pages} pages.
        {He} [read|finished] {first} pages on [Monday|Friday] and twice as many [the next day|the day after].
        How many pages are left [to read|for {name} to read]?
        """,
        """
        second = {first} * 2
        read = {first} + second
        result = {pages} - read
        """,
        {"pages": range(60, 500), "first": range(5, 100)},
    ),
    Template(
        "weeks_of_saving",
        """
        {name} wants a [bike|phone|guitar] for ${cost} and [already has|has saved] ${saved}.
        [Every|Each] week {he} [earns|gets] ${earned} and spends ${spent} of it.
        [After|In] how many weeks can {he} [buy it|pay for it]?
        """,
        """
        needed = {cost} - {saved}
        kept = {earned} - {spent}
        result = needed / kept
        """,
        {"cost": range(50, 500), "saved": range(5, 200), "earned": range(10, 60), "spent": range(2, 40)},
    ),
    Template(
        "around_the_field",
        """
        A rectangular [field|park|garden] is {length} meters long and {width} meters wide.
        {name} [runs|walks|rides] around it {laps} times.
        How many meters [is that|does {he} cover] [in all|altogether|in total]?
        """,
        """
        half = {length} + {width}
        lap = half * 2
        result = lap * {laps}
        """,
        {"length": range(20, 200), "width": range(10, 100), "laps": range(2, 12)},
    ),
    Template(
        "percent_off",
        """
        A [table|phone|coat|camera] costs ${price}.
        [Today|This week|In a sale], it is {percent} percent [off|cheaper].
        How [much does it cost now|many dollars does it cost now|much is it now]?
        """,
        """
        product = {price} * {percent}
        discount = product / 100
        result = {price} - discount
        """,
        {"price": range(20, 1000), "percent": range(5, 95)},
    ),
]

FOUR_STEPS = [
    Template(
        "change_after_shopping",
        """
        {name} [has|takes|has saved] ${money}.
        {He} [buys|pays for|orders] {first} {items} at ${first_price} each
        and {second} {other_items} at ${second_price} each.
        How much money [is left|does {he} have left|does {he} still have]?
        """,
        """
        {items} = {first} * {first_price}
        {other_items} = {second} * {second_price}
        cost = {items} + {other_items}
        result = {money} - cost
        """,
        {
            "money": range(50, 1000),
            "first": range(2, 10),
            "first_price": range(2, 40),
            "second": range(2, 10),
            "second_price": range(2, 40),
        },
    ),
    Template(
        "three_days_of_sales",
        """
        A [shop|baker|cook] [sold|sells] {first} {treats} on Monday, twice as many on Tuesday and {fewer} fewer on
        Wednesday than on Tuesday.
        How many {treats} is that [in all|altogether|in total]?
        """,
        """
        tuesday = {first} * 2
        wednesday = tuesday - {fewer}
        two_days = {first} + tuesday
        result = two_days + wednesday
        """,
        {"first": range(5, 200), "fewer": range(2, 100)},
    ),
    Template(
        "half_as_many",
        """
        {name} has {first} {toys} [at home|in a drawer|in a bag], and {friend} has half as many.
        {name}'s [brother|sister|cousin] has {more} more than {friend}.
        How many {toys} do the three have [together|in all|altogether]?
        """,
        """
        second = {first} / 2
        third = second + {more}
        two = {first} + second
        result = two + third
        """,
        {"first": range(10, 300), "more": range(2, 100)},
    ),
    Template(
        "shared_earnings",
        """
        Together, {children} [children|friends|students] sell {first} {treats} [for|at] ${first_price} each
        and {second} {other_treats} [for|at] ${second_price} each.
        They share the money equally. How [many dollars|much] does each [get|receive]?
        """,
        """
        {treats} = {first} * {first_price}
        {other_treats} = {second} * {second_price}
        money = {treats} + {other_treats}
        result = money / {children}
        """,
        {
            "children": range(2, 13),
            "first": range(5, 50),
            "first_price": range(2, 10),
            "second": range(5, 50),
            "second_price": range(2, 10),
        },
    ),
    Template(
        "miles_to_go",
        """
        {name} has to [drive|travel|go] {distance} miles.
        {He} [drives|goes] for {first} hours at {first_speed} miles per hour and for {second} hours at {second_speed}.
        How many miles are left [to drive|to go|after that]?
        """,
        """
        first = {first} * {first_speed}
        second = {second} * {second_speed}
        driven = first + second
        result = {distance} - driven
        """,
        {
            "distance": range(100, 900),
            "first": range(2, 8),
            "first_speed": range(20, 70),
            "second": range(2, 8),
            "second_speed": range(20, 70),
        },
    ),
    Template(
        "price_of_the_buses",
        """
        {teachers} teachers and {classes} classes of {students} students each [go to|visit|travel to] a {place}.
        [Each|Every|One] bus [takes|has room for|carries] {seats} people and costs ${price}.
        How many dollars do [all the buses|the buses they need] cost?
        """,
        """
        students = {classes} * {students}
        people = students + {teachers}
        buses = people / {seats}
        result = buses * {price}
        """,
        {
            "classes": range(2, 12),
            "students": range(15, 35),
            "teachers": range(2, 20),
            "seats": range(12, 60),
            "price": range(50, 300),
        },
    ),
    Template(
        "eggs_for_a_week",
        """
        {name}'s hens lay {laid} eggs every day.
        {His} family eats {eaten} a day and [sells the rest|sells the others] for ${price} [a|per] dozen.
        How many dollars [does {he} earn|does {name} make|is that] [in|over] a week?
        """,
        """
        day = {laid} - {eaten}
        week = day * 7
        dozens = week / 12
        result = dozens * {price}
        """,
        {"laid": range(15, 150), "eaten": range(2, 50), "price": range(2, 13)},
    ),
    Template(
        "trays_and_boxes",
        """
        {name} [bakes|makes] {trays} trays of {each} {treats} and [buys|gets] {more} more.
        {His} [friends|guests|children] eat {eaten}, and the rest go into {count} equal {boxes}.
        How many {treats} [are in|go into] [each|every|one] {box}?
        """,
        """
        baked = {trays} * {each}
        {treats} = baked + {more}
        left = {treats} - {eaten}
        result = left / {count}
        """,
        {
            "trays": range(2, 12),
            "each": range(6, 30),
            "more": range(2, 40),
            "eaten": range(2, 60),
            "count": range(2, 13),
        },
    ),
    Template(
        "average_of_four_days",
        """
        [In|Over|During] four days, {name} [sold|picked|bought] {first}, {second}, {third} and {fourth} {fruits}.
        [How many {fruits}|How many] is that [a|per] day on average?
        """,
        """
        two = {first} + {second}
        three = two + {third}
        four = three + {fourth}
        result = four / 4
        """,
        {"first": range(5, 100), "second": range(5, 100), "third": range(5, 100), "fourth": range(5, 100)},
    ),
]

TEMPLATES = (*ONE_STEP, *TWO_STEPS, *THREE_STEPS, *FOUR_STEPS)
