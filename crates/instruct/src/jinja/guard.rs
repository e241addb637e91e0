//! The pass over a template's source that has the size of every operand checked.
//!
//! minijinja charges fuel for what an operation makes after it was made, and for the items of a value
//! but not for theirs. A filter behind every operand, [`VALUE`], therefore bounds what any operation,
//! filter, function or test takes in. It is inserted into the source, so that minijinja's parser remains
//! the only one: `a.b + f(c)` becomes `a.b|_v + f(c|_v)|_v`. A filter binds more tightly than every
//! operator.
//!
//! The same pass mends what Jinja2 reads otherwise: escapes in string literals, texts on both sides of
//! `~`, and `%` behind a string.

use std::borrow::Cow;
use std::collections::HashSet;

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

use super::{HELD, MARKED, VALUE, literals};

mod operands;

use operands::{Scan, State};

/// The largest source of a template in bytes.
const MAX_SOURCE: usize = 128 << 10;

/// The most tokens between two delimiters. The parser's recursion is at most as deep.
const MAX_TOKENS: usize = 1024;

/// The most `elif` of a template, of which each is an `if` within the one before it.
const MAX_ELIFS: usize = 500;

/// Why a source is refused.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) line: usize,
    pub(super) problem: String,
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        Self {
            line: error.line().unwrap_or(1),
            problem: super::detail(error),
        }
    }
}

/// A source with what was inserted.
#[derive(Debug)]
pub(super) struct Guarded {
    pub(super) source: String,
    /// The names and the strings in its tags.
    pub(super) mentioned: HashSet<String>,
    /// Whether it has `generation` blocks.
    pub(super) has_marks: bool,
}

/// Inserts the filters that check operands, and replaces transformers' `generation` blocks.
///
/// These mark the assistant's messages; like `with` blocks, they have a scope of their own.
pub(super) fn guarded(source: &str, syntax: SyntaxConfig) -> Result<Guarded, Refusal> {
    let refusal = |span: Option<Span>, problem| Refusal {
        line: span.map_or(1, |span| span.start_line.into()),
        problem,
    };
    if source.len() > MAX_SOURCE {
        let n_bytes = source.len();
        let problem = format!("the template has {n_bytes} bytes, more than {MAX_SOURCE}");
        return Err(refusal(None, problem));
    }
    let (mut edits, mut tag, mut n_elifs) = (Edits::default(), Vec::new(), 0);
    let (mut mentioned, mut last) = (HashSet::new(), Span::default());
    for token in tokenize(source, false, syntax) {
        let (token, span) = match token {
            Err(error) if error.kind() == ErrorKind::BadEscape => {
                (Token::Str(""), literal_behind(source, last))
            }
            token => token.map_err(|error| Refusal::from(&error))?,
        };
        last = span;
        match token {
            Token::TemplateData(_) => {
                tag.clear();
                if begins_raw(source, span) {
                    edits.insert(span.start_offset, "\n");
                }
            }
            Token::VariableStart | Token::BlockStart => tag.clear(),
            Token::VariableEnd => edits.operands(&tag, State::Operand, VALUE, false),
            Token::BlockEnd => {
                if let Err(problem) = edits.statement(&tag) {
                    return Err(refusal(Some(span), problem));
                }
            }
            _ if tag.len() == MAX_TOKENS => {
                let problem = format!("a tag has more than {MAX_TOKENS} tokens");
                return Err(refusal(Some(span), problem));
            }
            token => {
                n_elifs += usize::from(tag.is_empty() && matches!(token, Token::Ident("elif")));
                if n_elifs > MAX_ELIFS {
                    let problem = format!("the template has more than {MAX_ELIFS} `elif`");
                    return Err(refusal(Some(span), problem));
                }
                match token {
                    Token::Ident(name) => mentioned.insert(name.to_owned()),
                    Token::Str(_) | Token::String(_) => {
                        let text = edits.literal(source, span);
                        mentioned.insert(text.map_err(|problem| refusal(Some(span), problem))?)
                    }
                    _ => false,
                };
                tag.push((token, span));
            }
        }
    }
    Ok(Guarded {
        has_marks: edits.has_marks,
        source: edits.applied(source),
        mentioned,
    })
}

/// Whether a text begins behind `raw` and a line end, which Jinja2 keeps and minijinja removes.
fn begins_raw(source: &str, text: Span) -> bool {
    let tag = source[..text.start_offset as usize].strip_suffix("%}\n");
    let tag = tag.and_then(|before| before.trim_ascii_end().strip_suffix("raw"));
    tag.is_some_and(|before| {
        let before = before.trim_ascii_end();
        before
            .strip_suffix(['-', '+'])
            .unwrap_or(before)
            .ends_with("{%")
    })
}

/// The span of the string literal behind a token, with an escape that is none to minijinja.
fn literal_behind(source: &str, last: Span) -> Span {
    let rest = &source[last.end_offset as usize..];
    let literal = rest.trim_ascii_start();
    let quote = literal.bytes().next();
    let mut is_escaped = true;
    let end = literal.bytes().position(|byte| {
        let is_end = !is_escaped && Some(byte) == quote;
        is_escaped = !is_escaped && byte == b'\\';
        is_end
    });
    let start = last.end_offset + (rest.len() - literal.len()) as u32;
    Span {
        start_offset: start,
        end_offset: start + end.map_or(0, |end| end as u32 + 1),
        ..last
    }
}

type Tag<'s> = [(Token<'s>, Span)];

/// Insertions and replacements: an offset, the number of bytes that are replaced, and the new text.
#[derive(Default)]
struct Edits {
    edits: Vec<(u32, u32, Cow<'static, str>)>,
    has_marks: bool,
}

impl Edits {
    fn insert(&mut self, at: u32, text: &'static str) {
        self.edits.push((at, 0, text.into()));
    }

    /// The text of a string literal, which is spelled in another way if minijinja reads another.
    fn literal(&mut self, source: &str, span: Span) -> Result<String, String> {
        let within = span.start_offset as usize + 1..(span.end_offset as usize).saturating_sub(1);
        let literal = source.get(within).ok_or("a string does not end")?;
        let text = literals::unescaped(literal)?;
        if literal.contains('\\') {
            self.replace(span, literals::spelled(&text));
        }
        Ok(text)
    }

    fn applied(mut self, source: &str) -> String {
        // What is inserted before a token that is replaced comes first.
        self.edits
            .sort_by_key(|&(at, n_replaced, _)| (at, n_replaced > 0));
        let (mut text, mut done) = (String::new(), 0);
        for (at, n_replaced, new) in self.edits {
            text += &source[done..at as usize];
            text += &new;
            done = (at + n_replaced) as usize;
        }
        text + &source[done..]
    }

    fn statement(&mut self, tag: &Tag) -> Result<(), String> {
        let Some(((Token::Ident(name), span), rest)) = tag.split_first() else {
            return Ok(());
        };
        let at = |is: fn(&Token) -> bool| {
            let at = rest.iter().position(|(token, _)| is(token));
            at.unwrap_or(rest.len())
        };
        match *name {
            "if" | "elif" => self.operands(rest, State::Operand, VALUE, false),
            "for" => {
                let iterable = &rest[at(|token| matches!(token, Token::Ident("in")))..];
                self.operands(iterable, State::Operator, VALUE, false);
            }
            "set" => {
                let at = at(|token| matches!(token, Token::Assign | Token::Pipe));
                let (target, value) = rest.split_at(at);
                // A namespace may have a second name, but not be within a value.
                let is_attribute = target.iter().any(|(token, _)| matches!(token, Token::Dot));
                let guard = if is_attribute { VALUE } else { HELD };
                let state = match value.first() {
                    Some((Token::Pipe, _)) => State::Stage { is_literal: true },
                    _ => State::Operator,
                };
                self.operands(value, state, guard, false);
            }
            "with" => self.operands(rest, State::Operand, HELD, false),
            "filter" => self.operands(rest, State::Filter, VALUE, false),
            "macro" => {
                let parameters = rest.get(1..).unwrap_or_default();
                self.operands(parameters, State::Parameters, VALUE, false);
            }
            // What these take is a call, not any expression.
            "call" => self.operands(rest, State::Parameters, VALUE, true),
            "do" => self.operands(rest, State::Operand, VALUE, true),
            "generation" => {
                self.has_marks = true;
                self.replace(*span, format!("with %}}{{% filter {MARKED}"));
            }
            "endgeneration" => self.replace(*span, "endfilter %}{% endwith"),
            "else" | "endif" | "endfor" | "endset" | "endwith" | "endmacro" | "endcall"
            | "endfilter" | "break" | "continue" => (),
            other => return Err(format!("the statement {other} is not supported")),
        }
        Ok(())
    }

    fn replace(&mut self, span: Span, text: impl Into<Cow<'static, str>>) {
        let n_replaced = span.end_offset - span.start_offset;
        self.edits
            .push((span.start_offset, n_replaced, text.into()));
    }

    /// Inserts `guard` behind the outermost operands of a tag, and [`VALUE`] behind those in brackets.
    ///
    /// A `bare` expression has nothing behind its end.
    fn operands(&mut self, tag: &Tag, state: State, guard: &'static str, bare: bool) {
        Scan::new(self, tag, guard, bare).run(state);
    }
}
