use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::Chars;

use super::class::{self, Escape};

/// Depth to which groups may be nested; `fancy-regex` ends at 64.
const MAX_DEPTH: usize = 60;

/// An expression for `fancy-regex`.
pub(super) struct Parsed {
    /// The flags of the whole expression, `(?i)` or nothing.
    pub(super) flags: String,
    pub(super) translated: String,
    pub(super) groups: BTreeMap<String, usize>,
}

/// The least and the most characters that a part can match; the most saturates.
#[derive(Clone, Copy, Default)]
struct Width {
    least: u64,
    most: u64,
}

impl Width {
    const ONE: Self = Self { least: 1, most: 1 };

    fn plus(self, other: Self) -> Self {
        Self {
            least: self.least.saturating_add(other.least),
            most: self.most.saturating_add(other.most),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            least: self.least.min(other.least),
            most: self.most.max(other.most),
        }
    }

    fn times(self, least: u64, most: u64) -> Self {
        Self {
            least: self.least.saturating_mul(least),
            most: self.most.saturating_mul(most),
        }
    }
}

/// What a quantifier would repeat.
#[derive(Clone, Copy)]
enum Last {
    Nothing,
    /// An item of this width, the width of what is before it, and where it was written.
    Item {
        width: Width,
        before: Width,
        start: usize,
    },
    Assertion,
    Repeat,
}

pub(super) struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    out: String,
    /// The widths of the groups, or none of those that are open.
    widths: Vec<Option<Width>>,
    groups: BTreeMap<String, usize>,
    /// The number of groups before the innermost look-behind.
    look_behind: Option<usize>,
    verbose: bool,
    flags: Flags,
    depth: usize,
}

/// Flags for the whole of an expression.
#[derive(Default)]
struct Flags {
    ignore_case: bool,
    multi_line: bool,
    dot_all: bool,
}

impl<'a> Parser<'a> {
    pub(super) fn parse(pattern: &'a str) -> Result<Parsed, String> {
        let mut parser = Self {
            rest: pattern.chars().peekable(),
            out: String::new(),
            widths: Vec::new(),
            groups: BTreeMap::new(),
            look_behind: None,
            verbose: false,
            flags: Flags::default(),
            depth: 0,
        };
        parser.global_flags()?;
        parser.alternatives()?;
        if parser.rest.next().is_some() {
            return Err("unbalanced parenthesis".into());
        }
        let Flags {
            ignore_case,
            multi_line,
            dot_all,
        } = parser.flags;
        let set = [(ignore_case, 'i'), (multi_line, 'm'), (dot_all, 's')];
        let set: String = set
            .into_iter()
            .filter(|(on, _)| *on)
            .map(|(_, c)| c)
            .collect();
        Ok(Parsed {
            flags: match &set[..] {
                "" => String::new(),
                set => format!("(?{set})"),
            },
            translated: parser.out,
            groups: parser.groups,
        })
    }

    fn take(&mut self, c: char) -> bool {
        self.rest.next_if_eq(&c).is_some()
    }

    /// Takes a text if the rest begins with it.
    fn take_text(&mut self, text: &str) -> bool {
        let mut rest = self.rest.clone();
        if text.chars().all(|c| rest.next() == Some(c)) {
            self.rest = rest;
            return true;
        }
        false
    }

    /// The text before `end`, which is taken too.
    fn until(&mut self, end: char) -> Result<String, String> {
        let mut text = String::new();
        loop {
            match self.rest.next() {
                Some(c) if c == end => return Ok(text),
                Some(c) => text.push(c),
                None => return Err(format!("missing `{end}`")),
            }
        }
    }

    /// `(?i)` and the like, which Python takes at the start alone.
    fn global_flags(&mut self) -> Result<(), String> {
        loop {
            let mut rest = self.rest.clone();
            let is_group = rest.next() == Some('(') && rest.next() == Some('?');
            let names: String =
                std::iter::from_fn(|| rest.next_if(char::is_ascii_alphabetic)).collect();
            // `(?P` begins a group with a name.
            if !is_group || names.is_empty() || rest.next() != Some(')') {
                return Ok(());
            }
            for name in names.chars() {
                match name {
                    'i' => self.flags.ignore_case = true,
                    'm' => self.flags.multi_line = true,
                    's' => self.flags.dot_all = true,
                    'x' => self.verbose = true,
                    'u' => (),
                    other => return Err(unknown_flag(other)),
                }
            }
            self.rest = rest;
            self.skip_ignored();
        }
    }

    /// In verbose expressions, skips spaces and comments.
    fn skip_ignored(&mut self) {
        while self.verbose {
            match self.rest.peek() {
                Some(' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}') => {
                    self.rest.next();
                }
                Some('#') => while self.rest.next().is_some_and(|c| c != '\n') {},
                _ => break,
            }
        }
    }

    fn alternatives(&mut self) -> Result<Width, String> {
        let mut width = self.branch()?;
        while self.take('|') {
            self.out.push('|');
            width = width.or(self.branch()?);
        }
        Ok(width)
    }

    fn branch(&mut self) -> Result<Width, String> {
        let mut width = Width::default();
        let mut last = Last::Nothing;
        loop {
            self.skip_ignored();
            let Some(&c) = self.rest.peek() else {
                return Ok(width);
            };
            if matches!(c, '|' | ')') {
                return Ok(width);
            }
            self.rest.next();
            if let Some((least, most)) = self.quantifier(c)? {
                let (of_item, before, start) = match last {
                    Last::Item {
                        width,
                        before,
                        start,
                    } => (width, before, start),
                    Last::Repeat => return Err("multiple repeat".into()),
                    Last::Nothing | Last::Assertion => return Err("nothing to repeat".into()),
                };
                self.repeat(start, least, most);
                width = before.plus(of_item.times(least, most));
                last = Last::Repeat;
                continue;
            }
            let (before, start) = (width, self.out.len());
            last = match self.item(c)? {
                Some(Item::Text(of_item)) => {
                    width = width.plus(of_item);
                    Last::Item {
                        width: of_item,
                        before,
                        start,
                    }
                }
                Some(Item::Assertion) => Last::Assertion,
                None => last,
            };
        }
    }

    /// The limits of the quantifier that begins with `c`, which was taken, if it is one.
    fn quantifier(&mut self, c: char) -> Result<Option<(u64, u64)>, String> {
        const UNLIMITED: u64 = u64::MAX;
        Ok(match c {
            '?' => Some((0, 1)),
            '*' => Some((0, UNLIMITED)),
            '+' => Some((1, UNLIMITED)),
            '{' => {
                let mut rest = self.rest.clone();
                let digits = |rest: &mut Peekable<Chars>| -> String {
                    std::iter::from_fn(|| rest.next_if(char::is_ascii_digit)).collect()
                };
                let least = digits(&mut rest);
                let is_range = rest.next_if_eq(&',').is_some();
                let most = if is_range {
                    digits(&mut rest)
                } else {
                    least.clone()
                };
                if rest.next() != Some('}') || (least.is_empty() && !is_range) {
                    return Ok(None);
                }
                self.rest = rest;
                let limit = |digits: String, none: u64| match &digits[..] {
                    "" => Ok(none),
                    digits => (digits.parse::<u32>().map(u64::from))
                        .map_err(|_| "the repetition number is too large".to_string()),
                };
                let (least, most) = (limit(least, 0)?, limit(most, UNLIMITED)?);
                if most < least {
                    return Err("min repeat greater than max repeat".into());
                }
                Some((least, most))
            }
            _ => None,
        })
    }

    /// Repeats what was written from `start` on, by the kind of repetition that follows.
    fn repeat(&mut self, start: usize, least: u64, most: u64) {
        // In a group of its own: what is one item there can be several signs here.
        self.out.insert_str(start, "(?:");
        self.out.push(')');
        let most = match most {
            u64::MAX => String::new(),
            most => most.to_string(),
        };
        self.out.push_str(&format!("{{{least},{most}}}"));
        if let Some(kind) = self.rest.next_if(|c| matches!(c, '?' | '+')) {
            self.out.push(kind);
        }
    }

    /// An item that begins with `c`, which was taken; a comment is none.
    fn item(&mut self, c: char) -> Result<Option<Item>, String> {
        let item = match c {
            '.' => {
                self.out.push('.');
                Item::Text(Width::ONE)
            }
            '^' | '$' => {
                self.out.push(c);
                Item::Assertion
            }
            '[' => {
                let class = class::read(&mut self.rest)?;
                self.out.push_str(&class);
                Item::Text(Width::ONE)
            }
            '(' => return self.group(),
            '\\' => match class::escape(&mut self.rest)? {
                Escape::Char(c) => self.literal(c),
                Escape::Class(name) => {
                    self.out.extend(['\\', name]);
                    Item::Text(Width::ONE)
                }
                Escape::Assertion(text) => {
                    self.out.push_str(text);
                    Item::Assertion
                }
                Escape::Group(number) => self.reference(number)?,
            },
            c => self.literal(c),
        };
        Ok(Some(item))
    }

    fn literal(&mut self, c: char) -> Item {
        class::push_literal(&mut self.out, c);
        Item::Text(Width::ONE)
    }

    /// A reference to what a group matched.
    fn reference(&mut self, number: usize) -> Result<Item, String> {
        let width = number.checked_sub(1).and_then(|at| self.widths.get(at));
        let width = match width {
            None => return Err(format!("invalid group reference {number}")),
            Some(None) => return Err("cannot refer to an open group".into()),
            Some(Some(width)) => *width,
        };
        if self.look_behind.is_some_and(|before| number > before) {
            return Err("cannot refer to group defined in the same lookbehind subpattern".into());
        }
        self.out.push_str(&format!(r"(?:\{number})"));
        Ok(Item::Text(width))
    }

    /// The rest of a group after its parenthesis.
    fn group(&mut self) -> Result<Option<Item>, String> {
        if !self.take('?') {
            return self.capturing(None).map(Some);
        }
        let kinds = [("<=", "(?<="), ("<!", "(?<!"), ("=", "(?="), ("!", "(?!")];
        for (name, opening) in kinds {
            if self.take_text(name) {
                return self.look_around(opening).map(Some);
            }
        }
        if self.take_text("P<") {
            let name = self.name('>')?;
            return self.capturing(Some(name)).map(Some);
        }
        if self.take_text("P=") {
            let name = self.name(')')?;
            let number = self.groups.get(&name);
            let number = *number.ok_or_else(|| format!("unknown group name `{name}`"))?;
            return self.reference(number).map(Some);
        }
        if self.take('#') {
            self.until(')')?;
            return Ok(None);
        }
        if self.take('>') {
            return self.nested("(?>").map(|width| Some(Item::Text(width)));
        }
        if self.take('(') {
            return Err("a condition on a group, `(?(`, is not supported".into());
        }
        let flags = self.scoped_flags()?;
        let verbose = std::mem::replace(&mut self.verbose, flags.verbose);
        let width = self.nested(&flags.opening)?;
        self.verbose = verbose;
        Ok(Some(Item::Text(width)))
    }

    /// A group whose parts follow, up to its end.
    fn nested(&mut self, opening: &str) -> Result<Width, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("groups are nested deeper than {MAX_DEPTH}"));
        }
        self.out.push_str(opening);
        let width = self.alternatives()?;
        if !self.take(')') {
            return Err("missing `)`".into());
        }
        self.out.push(')');
        self.depth -= 1;
        Ok(width)
    }

    fn capturing(&mut self, name: Option<String>) -> Result<Item, String> {
        let at = self.widths.len();
        self.widths.push(None);
        if let Some(name) = name {
            if self.groups.contains_key(&name) {
                return Err(format!("redefinition of group name `{name}`"));
            }
            self.groups.insert(name, at + 1);
        }
        let width = self.nested("(")?;
        self.widths[at] = Some(width);
        Ok(Item::Text(width))
    }

    fn look_around(&mut self, opening: &str) -> Result<Item, String> {
        let is_behind = opening.starts_with("(?<");
        let outer = self.look_behind;
        if is_behind {
            self.look_behind = outer.or(Some(self.widths.len()));
        }
        let width = self.nested(opening)?;
        self.look_behind = outer;
        if is_behind && width.least != width.most {
            return Err("look-behind requires fixed-width pattern".into());
        }
        Ok(Item::Text(Width::default()))
    }

    /// The name of a group, which `end` ends.
    fn name(&mut self, end: char) -> Result<String, String> {
        let name = self.until(end)?;
        let mut chars = name.chars();
        let begins = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_');
        if begins && chars.all(|c| c.is_alphanumeric() || c == '_') {
            return Ok(name);
        }
        Err(format!("bad character in group name `{name}`"))
    }

    /// The flags of a group, such as `(?i-s:`, after its question mark.
    fn scoped_flags(&mut self) -> Result<ScopedFlags, String> {
        let (mut on, mut off) = (String::new(), None::<String>);
        loop {
            let c = self.rest.next().ok_or("unexpected end of pattern")?;
            match (c, &mut off) {
                (':', _) => break,
                ('-', None) => off = Some(String::new()),
                ('i' | 'm' | 's' | 'x', None) => on.push(c),
                ('i' | 'm' | 's' | 'x', Some(off)) => off.push(c),
                ('u', None) => (),
                (')', _) => {
                    return Err("global flags not at the start of the expression".into());
                }
                ('a' | 'L' | 'u', _) => return Err(unknown_flag(c)),
                _ => return Err(format!("unknown extension ?{c}")),
            }
        }
        if off.as_ref().is_some_and(String::is_empty) {
            return Err("missing flag".into());
        }
        let off = off.unwrap_or_default();
        if on.chars().any(|c| off.contains(c)) {
            return Err("bad inline flags: flag turned on and off".into());
        }
        let verbose = (self.verbose || on.contains('x')) && !off.contains('x');
        let known = |names: &str| names.replace('x', "");
        let mut opening = format!("(?{}", known(&on));
        let off = known(&off);
        if !off.is_empty() {
            opening.push('-');
            opening.push_str(&off);
        }
        opening.push(':');
        Ok(ScopedFlags { opening, verbose })
    }
}

enum Item {
    Text(Width),
    Assertion,
}

struct ScopedFlags {
    opening: String,
    verbose: bool,
}

fn unknown_flag(name: char) -> String {
    match name {
        'a' => "the flag `a` (ASCII) is not supported".into(),
        other => format!("unknown flag `{other}`"),
    }
}
