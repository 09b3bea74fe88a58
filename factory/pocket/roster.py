"""Which part of the pocket world the teacher draws, and what is held out from all training but the judge's.

Two cores learn a few hundred well-told-apart things sharply or a thousand things blurred; these are the few hundred.
"""

HELD_OUT_OBJECTS = frozenset(
    "green heart|rat|crocodile|spiral shell|cherry blossom|scorpion|maple leaf|green apple|beans|cheese wedge|egg|spaghetti|"
    "soft ice cream|glass of milk|skateboard|ping pong|bullseye|chess pawn|graduation cap".split("|")
)
"""Whole concepts that no model but the judge is trained on."""

TEACHER_ROLES = frozenset(
    "astronaut|firefighter|police officer|farmer|cook|artist|health worker|judge|construction worker|pilot|student|mechanic".split(
        "|"
    )
)

TEACHER_OBJECTS = frozenset(
    (
        "grinning face|smiling face with heart-eyes|thinking face|sleeping face|smiling face with sunglasses|nerd face|"
        "crying face|angry face|cowboy hat face|skull|clown face|ghost|alien|robot|red heart|yellow heart|blue heart|"
        "monkey face|dog face|fox|cat face|lion|tiger face|horse face|unicorn|zebra|cow face|pig face|camel|giraffe|"
        "elephant|rhinoceros|mouse face|rabbit face|hedgehog|bat|bear|koala|panda|sloth|kangaroo|chicken|bird|penguin|eagle|"
        "duck|swan|owl|flamingo|peacock|parrot|frog|turtle|snake|dragon|t-rex|spouting whale|dolphin|tropical fish|blowfish|"
        "shark|octopus|crab|lobster|shrimp|snail|butterfly|ant|honeybee|lady beetle|spider|"
        "bouquet|lotus|rose|hibiscus|sunflower|tulip|potted plant|evergreen tree|deciduous tree|palm tree|cactus|four leaf clover|"
        "mushroom|grapes|watermelon|tangerine|lemon|banana|pineapple|red apple|pear|peach|cherries|strawberry|kiwi fruit|"
        "tomato|avocado|eggplant|carrot|ear of corn|hot pepper|cucumber|broccoli|onion|bread|croissant|pretzel|pancakes|"
        "hamburger|french fries|pizza|hot dog|taco|popcorn|sushi|ice cream|doughnut|cookie|birthday cake|cupcake|"
        "chocolate bar|lollipop|teapot|wine glass|tropical drink|beer mug|bubble tea|"
        "house|castle|tent|locomotive|bus|ambulance|fire engine|police car|taxi|automobile|tractor|racing car|motor scooter|"
        "bicycle|roller skate|vertical traffic light|stop sign|anchor|sailboat|speedboat|ship|airplane|parachute|helicopter|"
        "rocket|flying saucer|hourglass done|watch|alarm clock|crescent moon|sun|ringed planet|star|cloud|rainbow|umbrella|"
        "snowflake|snowman|fire|droplet|jack-o-lantern|christmas tree|balloon|wrapped gift|trophy|soccer ball|basketball|"
        "volleyball|tennis|bowling|ice skate|kite|pool 8 ball|crystal ball|video game|game die|teddy bear|"
        "glasses|sunglasses|t-shirt|jeans|scarf|gloves|dress|handbag|backpack|running shoe|high-heeled shoe|crown|top hat|"
        "lipstick|ring|gem stone|bell|headphone|radio|saxophone|trumpet|accordion|guitar|violin|drum|maracas|mobile phone|"
        "telephone|laptop|television|camera|candle|light bulb|closed book|envelope|package|pencil|paintbrush|key|hammer|axe|"
        "bomb|bow and arrow|shield|wrench|gear|magnet|ladder|microscope|telescope|door|bed|chair|bucket|shopping cart"
    ).split("|")
)
