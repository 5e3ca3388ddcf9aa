"""The fixed prompts of `moa-serve bench quality`: prose, dialogue, mathematics and code, 40 to 80 tokens each, written for this project.

ASCII, so that every tokenizer has them. Changing one changes every figure that was measured with them.
"""

_TEXTS = r"""
The ferry left an hour late, because the fog had come up the river in the night and nobody could see the far bank. The
passengers sat on their boxes and bags, drank tea from tin cups, and told each other what they would do first when
they reached the city.
----
Moss grows slowly on the north side of the old stone wall. In spring it is bright green and soft as a carpet; by the
end of August it has turned brown and brittle, and a child who leans on it comes away with dust on both hands.
----
My grandmother kept her letters in a biscuit tin under the bed. There were letters from her brother in the navy, from
a teacher she had loved, and one, without a stamp or a name, that she never let any of us read.
----
When a volcano erupts under the sea, the water cools the lava so quickly that it forms rounded lumps called pillows.
Over thousands of years these lumps pile up, and if the eruptions go on for long enough, a new island rises above the
waves.
----
Bread needs only four things: flour, water, salt and yeast. Mix them in the evening, cover the bowl with a cloth, and
leave it in a cool place. In the morning the dough will have doubled, and you can shape it, let it rest, and bake it
until the crust sounds hollow.
----
The council met on Tuesday to decide whether the old railway bridge should be repaired or taken down. Repairs would
cost about two million, the engineer said, and would last for thirty years; a new bridge would cost four times as
much.
----
Honey bees tell each other where to find flowers by dancing. A bee that has found a good place runs in a straight
line, shaking its body, then circles back and does it again. The angle of the line shows the direction, and its length
shows the distance.
----
It rained on the first day of the holiday, and on the second, and on the third we stopped looking out of the window.
We played cards, read the same two newspapers, and argued about whose idea it had been to come to the mountains in
November.
----
"Have you seen my keys?" asked Martin. "They were on the table," said Ruth, without looking up from her book. "They
are not on the table now." "Then look in your coat." He looked in his coat. "Well?" she said. "They were in my coat,"
he said.
----
User: I want to travel from Lisbon to Vienna by train. How long will it take?
Assistant: There is no direct train. You would usually go by way of Madrid and Zurich, and you should plan for at
least two days.
User: Which part is the most beautiful?
Assistant:
----
CLERK: What can I do for you?
WOMAN: I would like to return this lamp. It does not work.
CLERK: Did you put in a bulb?
WOMAN: It came without one.
CLERK: They all come without one, madam.
WOMAN: Then how was I to know?
----
Doctor: How long have you had the cough?
Patient: About two weeks. It is worse at night, and when I climb the stairs.
Doctor: Do you smoke, or work with anything dusty?
Patient: I have been sanding the floors of our new house.
Doctor: Without a mask, I suppose.
----
Dear Mr. Alvarez, thank you for your application. We were impressed by your work on bridges and would like to invite
you to an interview on the 14th of March at ten o'clock. Please let us know whether this date suits you. Yours
sincerely,
----
Question: A baker makes 12 trays of rolls with 18 rolls on each tray. She sells 150 rolls in the morning. How many
rolls are left?
Answer: She makes 12 * 18 = 216 rolls. After the morning there are 216 - 150 =
----
To prove that the sum of two odd numbers is even, write the numbers as 2a + 1 and 2b + 1, where a and b are whole
numbers. Their sum is 2a + 2b + 2 = 2(a + b + 1), which is twice a whole number, and therefore
----
Solve for x: 3x + 7 = 2x - 5. Subtract 2x from both sides to get x + 7 = -5. Then subtract 7 from both sides to get x
= -12. Check: the left side is 3 * (-12) + 7 =
----
A right triangle has legs of length 6 and 8. By the theorem of Pythagoras the square of the hypotenuse is 36 + 64 =
100, so the hypotenuse is 10. The area of the triangle is half of 6 times 8, which is 24, and its perimeter is
----
All of the cats in the shelter are older than one year. Milo is a cat in the shelter. Some animals in the shelter are
dogs, and every dog is younger than Milo. From this we can conclude that Milo is older than
----
def mean(values):
    # The arithmetic mean of a list of numbers.
    if not values:
        raise ValueError("mean of an empty list")
    total = 0
    for value in values:
        total += value
    return
----
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return
----
#include <stdio.h>

int main(void) {
    int sum = 0;
    for (int i = 1; i <= 100; i++) {
        if (i % 3 == 0) {
            sum += i;
        }
    }
    printf("%d\n", sum);
----
SELECT customers.name, COUNT(orders.id) AS num_orders, SUM(orders.total) AS spent
FROM customers
LEFT JOIN orders ON orders.customer_id = customers.id
GROUP BY customers.name
HAVING COUNT(orders.id) > 3
ORDER BY
----
{
  "name": "weather-station",
  "version": "1.4.2",
  "sensors": [
    {"id": 1, "kind": "temperature", "unit": "celsius"},
    {"id": 2, "kind": "humidity", "unit": "percent"}
  ],
  "interval":
----
La petite maison au bord du lac etait vide depuis des annees. Le toit laissait passer la pluie, et dans le jardin les
ronces avaient tout envahi. Pourtant, chaque soir, une lumiere brillait a la fenetre de la cuisine.
"""

PROMPTS = tuple(text.strip() for text in _TEXTS.split("\n----\n"))
