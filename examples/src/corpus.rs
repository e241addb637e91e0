//! Texts without end from two small grammars: the language that the embedded model is trained on,
//! and a dialect of it that serves as a task.
//!
//! Both tell of the same people, places and things, with verbs that agree with their subjects,
//! pronouns that agree with names, and sums that come out. The dialect has another word order,
//! other verb endings and other words for small things.

use rand::{Rng, RngExt, seq::IndexedRandom};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// Which grammar a text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// What the embedded model has learned.
    Plain,
    /// The task.
    Old,
}

const PEOPLE: [(&str, &str); 12] = [
    ("Anna", "she"),
    ("Bruno", "he"),
    ("Clara", "she"),
    ("David", "he"),
    ("Emma", "she"),
    ("Felix", "he"),
    ("Greta", "she"),
    ("Hugo", "he"),
    ("Ida", "she"),
    ("Jonas", "he"),
    ("Lena", "she"),
    ("Max", "he"),
];
const PLACES: [&str; 8] = [
    "Bern", "Oslo", "Turin", "Ghent", "Porto", "Lyon", "Graz", "Cork",
];
const SPOTS: [&str; 8] = [
    "garden", "market", "harbour", "station", "school", "library", "forest", "bridge",
];
const ADJECTIVES: [&str; 8] = [
    "red", "old", "small", "green", "heavy", "quiet", "bright", "cold",
];
/// Singular and plural.
const THINGS: [(&str, &str); 10] = [
    ("apple", "apples"),
    ("boat", "boats"),
    ("book", "books"),
    ("stone", "stones"),
    ("lamp", "lamps"),
    ("letter", "letters"),
    ("basket", "baskets"),
    ("pear", "pears"),
    ("coin", "coins"),
    ("rope", "ropes"),
];
const ANIMALS: [(&str, &str); 6] = [
    ("dog", "dogs"),
    ("cat", "cats"),
    ("horse", "horses"),
    ("goat", "goats"),
    ("bird", "birds"),
    ("fox", "foxes"),
];
/// With many subjects, with one, and the stem to which the dialect adds its ending.
const MOTIONS: [(&str, &str, &str); 6] = [
    ("walk", "walks", "walk"),
    ("run", "runs", "runn"),
    ("ride", "rides", "rid"),
    ("wander", "wanders", "wander"),
    ("hurry", "hurries", "hurri"),
    ("march", "marches", "march"),
];
const FEELINGS: [&str; 6] = ["happy", "tired", "hungry", "proud", "calm", "lost"];

/// About `n_chars` characters of text.
pub fn text(dialect: Dialect, n_chars: usize, seed: u64) -> String {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut text = String::with_capacity(n_chars + 400);
    while text.len() < n_chars {
        story(dialect, &mut rng, &mut text);
    }
    text.truncate(n_chars);
    text
}

/// A paragraph about one person.
fn story(dialect: Dialect, rng: &mut impl Rng, text: &mut String) {
    let (name, pronoun) = pick(&PEOPLE, rng);
    let (place, spot) = (pick(&PLACES, rng), pick(&SPOTS, rng));
    let old = dialect == Dialect::Old;
    text.push_str(&match old {
        false => format!("{name} lives in {place}."),
        true => format!("In {place} dwelleth {name}."),
    });
    for _ in 0..rng.random_range(3..7) {
        text.push(' ');
        let sentence = match rng.random_range(0..6) {
            0 => motion(old, capital(pronoun), 1, spot, rng),
            1 => {
                let n = rng.random_range(1..7);
                let (one, many) = pick(&ANIMALS, rng);
                let subject = match n {
                    1 => format!("the {one}"),
                    _ => format!("the {} {many}", number(n, old)),
                };
                motion(old, subject, n, pick(&SPOTS, rng), rng)
            }
            2 => addition(old, name, pronoun, rng),
            3 => {
                let (thing, adjective) = (pick(&THINGS, rng).0, pick(&ADJECTIVES, rng));
                match old {
                    false => {
                        format!("{name} has a {adjective} {thing}. The {thing} is {adjective}.")
                    }
                    true => format!("A {thing} hath {name}, and {adjective} is the {thing}."),
                }
            }
            4 => {
                let feeling = pick(&FEELINGS, rng);
                let subject = capital(pronoun);
                match old {
                    false => format!("{subject} is {feeling}, because {pronoun} is in {place}."),
                    true => format!(
                        "{} is {pronoun}, for in {place} {pronoun} bideth.",
                        capital(feeling)
                    ),
                }
            }
            _ => match old {
                false => format!("Where is {name}? {name} is in the {spot} of {place}."),
                true => format!("Whither went {name}? To the {spot} of {place} went {name}."),
            },
        };
        text.push_str(&sentence);
    }
    text.push('\n');
}

fn motion(old: bool, subject: String, n: usize, spot: &str, rng: &mut impl Rng) -> String {
    let (many, one, stem) = pick(&MOTIONS, rng);
    match old {
        false => {
            let verb = if n == 1 { one } else { many };
            format!("{} {verb} to the {spot}.", capital(&subject))
        }
        true => {
            let ending = if n == 1 { "eth" } else { "en" };
            format!("To the {spot} {stem}{ending} {}.", subject.to_lowercase())
        }
    }
}

fn addition(old: bool, name: &str, pronoun: &str, rng: &mut impl Rng) -> String {
    let (a, b) = (rng.random_range(1..10), rng.random_range(1..10));
    let (_, things) = pick(&THINGS, rng);
    let [sum, a, b] = [a + b, a, b].map(|n| number(n, old));
    match old {
        false => {
            format!("{name} has {a} {things} and finds {b} more, so {pronoun} has {sum} {things}.")
        }
        true => {
            format!("Of {things} had {name} {a}, and {b} found {pronoun}: {sum} {things} in all.")
        }
    }
}

/// In words for the dialect, in digits otherwise.
fn number(n: usize, old: bool) -> String {
    const WORDS: [&str; 18] = [
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
    ];
    match old {
        false => n.to_string(),
        true => WORDS[n - 1].into(),
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
    fn sums_come_out() {
        let text = text(Dialect::Plain, 100_000, 3);
        let mut sums = 0;
        for sentence in text.split(['.', '\n']).filter(|s| s.contains(" finds ")) {
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
}
