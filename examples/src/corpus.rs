//! Generated texts about a small world: in the language that the embedded models are trained on, and in
//! an old dialect of it, which is a task to tune them for.
//!
//! 240 people each have a home, a trade, an age, an animal and a friend. All texts agree on these facts,
//! so that a model can learn them. Verbs agree with their subjects, pronouns with names, and sums are
//! correct.

use rand::{Rng, RngExt, seq::IndexedRandom};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// The language of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// The language that the models are trained on, with one paragraph of 300 in the old dialect.
    Plain,
    /// The dialect of the task, with another word order, other endings, and numbers in words.
    Old,
}

const FIRST: [&str; 40] = [
    "Al", "An", "Be", "Bru", "Ca", "Cle", "Da", "De", "El", "Em", "Fa", "Fre", "Ga", "Gre", "Ha",
    "He", "Il", "In", "Ja", "Jo", "Ka", "Le", "Li", "Lu", "Ma", "Mi", "Na", "Ni", "Ol", "Or", "Pa",
    "Pe", "Ra", "Ro", "Sa", "Si", "Ta", "Ti", "Va", "Vi",
];
const LAST: [&str; 6] = ["bena", "lina", "rissa", "dan", "fred", "rico"];
/// The number of women's names in [`LAST`], which come first.
const N_FEMALE: usize = 3;
const PLACES: [&str; 24] = [
    "Bern", "Oslo", "Turin", "Ghent", "Porto", "Lyon", "Graz", "Cork", "Malmo", "Basel", "Delft",
    "Genoa", "Linz", "Nantes", "Pisa", "Riga", "Split", "Tartu", "Ulm", "Vigo", "York", "Zadar",
    "Bruges", "Cadiz",
];
const TRADES: [&str; 20] = [
    "baker",
    "miller",
    "weaver",
    "potter",
    "sailor",
    "tailor",
    "mason",
    "farmer",
    "singer",
    "doctor",
    "teacher",
    "painter",
    "cooper",
    "smith",
    "hunter",
    "printer",
    "gardener",
    "carpenter",
    "fisher",
    "porter",
];
/// Singular and plural.
const ANIMALS: [(&str, &str); 10] = [
    ("dog", "dogs"),
    ("cat", "cats"),
    ("horse", "horses"),
    ("goat", "goats"),
    ("bird", "birds"),
    ("fox", "foxes"),
    ("sheep", "sheep"),
    ("mule", "mules"),
    ("goose", "geese"),
    ("hen", "hens"),
];
const THINGS: [&str; 12] = [
    "apples", "boats", "books", "stones", "lamps", "letters", "baskets", "pears", "coins", "ropes",
    "jars", "shoes",
];
const SPOTS: [&str; 10] = [
    "garden", "market", "harbour", "station", "school", "library", "forest", "bridge", "mill",
    "square",
];
/// Plural, singular, and the stem to which the dialect adds its ending.
const MOTIONS: [(&str, &str, &str); 6] = [
    ("walk", "walks", "walk"),
    ("run", "runs", "runn"),
    ("ride", "rides", "rid"),
    ("wander", "wanders", "wander"),
    ("hurry", "hurries", "hurri"),
    ("march", "marches", "march"),
];

/// The facts about a person.
struct Person {
    name: String,
    pronoun: &'static str,
    home: &'static str,
    trade: &'static str,
    age: usize,
    animal: (&'static str, &'static str),
    /// The number of another person.
    friend: usize,
}

const N_PEOPLE: usize = FIRST.len() * LAST.len();

/// Returns the person of a number, the same in all texts.
fn person(number: usize) -> Person {
    let mut facts = ChaCha8Rng::seed_from_u64(number as u64);
    let last = number % LAST.len();
    Person {
        name: format!("{}{}", FIRST[number / LAST.len()], LAST[last]),
        pronoun: if last < N_FEMALE { "she" } else { "he" },
        home: pick(&PLACES, &mut facts),
        trade: pick(&TRADES, &mut facts),
        age: facts.random_range(20..80),
        animal: pick(&ANIMALS, &mut facts),
        friend: facts.random_range(0..N_PEOPLE),
    }
}

/// Generates `n_chars` characters of text.
pub fn text(dialect: Dialect, n_chars: usize, seed: u64) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut text = String::with_capacity(n_chars + 1000);
    while text.len() < n_chars {
        let old = dialect == Dialect::Old || rng.random_ratio(1, 300);
        paragraph(old, &mut rng, &mut text);
    }
    text.truncate(n_chars);
    text
}

/// Generates questions about the facts, each with its choices and the index of the right one.
pub fn questions(n: usize, seed: u64) -> Vec<(String, Vec<String>, usize)> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let question = |_| {
        let Person {
            name,
            home,
            trade,
            age,
            ..
        } = person(rng.random_range(0..N_PEOPLE));
        let (context, right, others): (String, String, Vec<String>) = match rng.random_range(0..3) {
            0 => (
                format!("{name} is a"),
                trade.into(),
                TRADES.map(String::from).into(),
            ),
            1 => (
                format!("{name} is a {trade} from"),
                home.into(),
                PLACES.map(String::from).into(),
            ),
            _ => {
                let years = rng.random_range(2..20);
                let all = (20..100).map(|age: usize| age.to_string());
                (
                    format!("{name} is a {trade} from {home}. In {years} years, {name} will be"),
                    (age + years).to_string(),
                    all.collect(),
                )
            }
        };
        let answer = rng.random_range(0..4);
        let mut choices: Vec<String> = Vec::new();
        while choices.len() < 4 {
            let choice = if choices.len() == answer {
                &right
            } else {
                others.choose(&mut rng).expect("a list of this file")
            };
            if choices.len() == answer || (choice != &right && !choices.contains(choice)) {
                choices.push(choice.clone());
            }
        }
        (context, choices, answer)
    };
    (0..n).map(question).collect()
}

/// Appends some sentences about one person.
fn paragraph(old: bool, rng: &mut impl Rng, text: &mut String) {
    let someone = person(rng.random_range(0..N_PEOPLE));
    let Person {
        name, home, trade, ..
    } = &someone;
    text.push_str(&if old {
        format!("In {home} dwelleth {name} the {trade}.")
    } else {
        format!("{name} is a {trade} from {home}.")
    });
    for _ in 0..rng.random_range(3..7) {
        text.push(' ');
        let sentence = match rng.random_range(0..6) {
            0 => motion(old, &someone, rng),
            1 => herd(old, &someone, rng),
            2 | 3 => addition(old, &someone, rng),
            4 => age(old, &someone, rng),
            _ => friend(old, &someone),
        };
        text.push_str(&sentence);
    }
    text.push('\n');
}

fn motion(old: bool, someone: &Person, rng: &mut impl Rng) -> String {
    let (spot, (_, one, stem)) = (pick(&SPOTS, rng), pick(&MOTIONS, rng));
    let Person { pronoun, home, .. } = someone;
    if old {
        format!("To the {spot} of {home} {stem}eth {pronoun}.")
    } else {
        format!("{} {one} to the {spot} of {home}.", capital(pronoun))
    }
}

fn herd(old: bool, someone: &Person, rng: &mut impl Rng) -> String {
    let Person { name, animal, .. } = someone;
    let (spot, (many, one, stem)) = (pick(&SPOTS, rng), pick(&MOTIONS, rng));
    let n = rng.random_range(1..8);
    let (animal, verb, ending) = match n {
        1 => (animal.0, one, "eth"),
        _ => (animal.1, many, "en"),
    };
    let count = number(n, old);
    if old {
        format!("To the {spot} {stem}{ending} the {count} {animal} of {name}.")
    } else {
        format!("The {count} {animal} of {name} {verb} to the {spot}.")
    }
}

fn addition(old: bool, someone: &Person, rng: &mut impl Rng) -> String {
    let Person { name, pronoun, .. } = someone;
    let things = pick(&THINGS, rng);
    let (a, b) = (rng.random_range(2..30), rng.random_range(2..30));
    let [sum, a, b] = [a + b, a, b].map(|n| number(n, old));
    if old {
        format!("Of {things} had {name} {a}, and {b} bought {pronoun}: {sum} {things} in all.")
    } else {
        format!("{name} has {a} {things} and buys {b} more, so {pronoun} has {sum} {things}.")
    }
}

fn age(old: bool, someone: &Person, rng: &mut impl Rng) -> String {
    let Person { pronoun, age, .. } = someone;
    let years = rng.random_range(2..20);
    let [age, years, then] = [*age, years, age + years].map(|n| number(n, old));
    if old {
        format!(
            "{} winters hath {pronoun} seen, and after {years} more {then}.",
            capital(&age)
        )
    } else {
        format!(
            "{} is {age}, and in {years} years {pronoun} will be {then}.",
            capital(pronoun)
        )
    }
}

fn friend(old: bool, someone: &Person) -> String {
    let Person {
        name, home, trade, ..
    } = person(someone.friend);
    let own = &someone.name;
    if old {
        format!("Friend to {own} is {name}, {trade} of {home}.")
    } else {
        format!("The friend of {own} is {name}, the {trade} from {home}.")
    }
}

/// Writes a number below 100 in words for the dialect, in digits otherwise.
fn number(n: usize, old: bool) -> String {
    const ONES: [&str; 20] = [
        "none",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
    ];
    const TENS: [&str; 10] = [
        "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    ];
    match (old, n / 10, n % 10) {
        (false, ..) => n.to_string(),
        (true, 0 | 1, _) => ONES[n].into(),
        (true, tens, 0) => TENS[tens].into(),
        (true, tens, ones) => format!("{} and {}", ONES[ones], TENS[tens]),
    }
}

fn capital(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    first.to_uppercase() + rest
}

fn pick<T: Copy>(all: &[T], rng: &mut impl Rng) -> T {
    *all.choose(rng).expect("a list of this file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_text() {
        assert_eq!(text(Dialect::Plain, 2000, 1), text(Dialect::Plain, 2000, 1));
        assert_ne!(text(Dialect::Plain, 2000, 1), text(Dialect::Plain, 2000, 2));
    }

    #[test]
    fn sums_are_correct() {
        let text = text(Dialect::Plain, 100_000, 3);
        let mut sums = 0;
        for sentence in text.split(['.', '\n']).filter(|s| s.contains(" buys ")) {
            let numbers = sentence
                .split(' ')
                .filter_map(|word| word.parse::<usize>().ok());
            if let [a, b, sum] = numbers.collect::<Vec<_>>()[..] {
                assert_eq!(a + b, sum, "{sentence}");
                sums += 1;
            }
        }
        assert!(sums > 100);
    }

    #[test]
    fn all_texts_agree_on_the_facts() {
        let homes = |seed| {
            let text = text(Dialect::Plain, 200_000, seed);
            let known = text.lines().filter_map(|line| {
                let (name, rest) = line.split_once(" is a ")?;
                Some((name.to_string(), rest.split('.').next()?.to_string()))
            });
            known.collect::<std::collections::BTreeMap<_, _>>()
        };
        let (first, second) = (homes(1), homes(2));
        let both: Vec<_> = first
            .iter()
            .filter(|(name, _)| second.contains_key(*name))
            .collect();
        assert!(both.len() > 100);
        assert!(both.iter().all(|(name, facts)| &second[*name] == *facts));
    }
}
