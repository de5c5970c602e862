// Which pages come first in a search: answers before comparisons, and a title before a word in a text.
const KINDS = [
  ["how-to/", 10],
  ["reference/errors", 10],
  ["reference/", 6],
  ["tutorial", 4],
  ["explanation/", 2],
  ["notebooks/", -6],
  ["coming-from/", -6],
  ["changelog", -20],
];

var Scorer = {
  score: ([page, title, anchor, description, score]) =>
    score + (KINDS.find(([start]) => page.startsWith(start))?.[1] ?? 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
