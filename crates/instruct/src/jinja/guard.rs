//! The pass over a template's source that has the size of every operand checked.
//!
//! minijinja charges fuel for what an operation makes after it was made, and for the items of a value
//! but not for theirs. A filter behind every operand, [`VALUE`], therefore bounds what any operation,
//! filter, function or test takes in. It is inserted into the source, so that minijinja's parser remains
//! the only one: `a.b + f(c)` becomes `a.b|_v + f(c|_v)|_v`. A filter binds more tightly than every
//! operator.

use minijinja::Error;
use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;

use super::{HELD, SCALAR, VALUE};

/// The largest source of a template in bytes.
const MAX_SOURCE: usize = 128 << 10;

/// The most tokens between two delimiters. The parser's recursion is at most as deep.
const MAX_TOKENS: usize = 1024;

/// The most `elif` of a template, of which each is an `if` within the one before it.
const MAX_ELIFS: usize = 500;

/// The longest literal that need not be checked, in bytes.
const MAX_LITERAL: u32 = 256;

/// Filters and tests whose work does not depend on the size of what they are applied to.
const FREE_FILTERS: [&str; 6] = ["count", "d", "default", "first", "last", "length"];
const FREE_TESTS: [&str; 11] = [
    "boolean",
    "defined",
    "false",
    "integer",
    "iterable",
    "mapping",
    "none",
    "sequence",
    "string",
    "true",
    "undefined",
];

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

/// Inserts the filters that check operands, and replaces transformers' `generation` blocks.
///
/// These mark the assistant's messages; like `with` blocks, they have a scope of their own.
pub(super) fn guarded(source: &str, syntax: SyntaxConfig) -> Result<String, Refusal> {
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
    for token in tokenize(source, false, syntax) {
        let (token, span) = token.map_err(|error| Refusal::from(&error))?;
        match token {
            Token::TemplateData(_) | Token::VariableStart | Token::BlockStart => tag.clear(),
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
                tag.push((token, span));
            }
        }
    }
    Ok(edits.applied(source))
}

type Tag<'s> = [(Token<'s>, Span)];

/// Insertions and replacements: an offset, the number of bytes that are replaced, and the new text.
#[derive(Default)]
struct Edits(Vec<(u32, u32, &'static str)>);

impl Edits {
    fn insert(&mut self, at: u32, text: &'static str) {
        self.0.push((at, 0, text));
    }

    fn applied(mut self, source: &str) -> String {
        self.0.sort_by_key(|&(at, ..)| at);
        let (mut text, mut done) = (String::new(), 0);
        for (at, n_replaced, new) in self.0 {
            text += &source[done..at as usize];
            text += new;
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
            "generation" => self.replace(*span, "with"),
            "endgeneration" => self.replace(*span, "endwith"),
            "else" | "endif" | "endfor" | "endset" | "endwith" | "endmacro" | "endcall"
            | "endfilter" | "break" | "continue" => (),
            other => return Err(format!("the statement {other} is not supported")),
        }
        Ok(())
    }

    fn replace(&mut self, span: Span, text: &'static str) {
        let n_replaced = span.end_offset - span.start_offset;
        self.0.push((span.start_offset, n_replaced, text));
    }

    /// Inserts `guard` behind the outermost operands of a tag, and [`VALUE`] behind those in brackets.
    ///
    /// A `bare` expression has nothing behind its end.
    fn operands(&mut self, tag: &Tag, state: State, guard: &'static str, bare: bool) {
        let scan = Scan {
            edits: self,
            tag,
            at: 0,
            guard,
            bare,
            brackets: Vec::new(),
            is_repeated: false,
            argument: None,
        };
        scan.run(state);
    }
}

/// What comes next.
#[derive(Clone, Copy)]
enum State {
    /// An operand, or a closing bracket.
    Operand,
    /// More of the operand that begins at `start`: an attribute, a subscript, or arguments.
    Postfix { start: u32, is_literal: bool },
    /// A filter or a test of an operand, or an operator.
    Stage { is_literal: bool },
    /// The name of a filter.
    Filter,
    /// The parameters of a macro or of a call block, if it has any.
    Parameters,
    /// An operator, or a closing bracket.
    Operator,
}

/// An open bracket, by what it is closed to.
#[derive(Clone, Copy, PartialEq)]
enum Bracket {
    /// An operand that begins at `start`: a list, a map, a tuple, or an operand with arguments or a
    /// subscript.
    Operand { start: u32 },
    /// The arguments of a filter.
    Filter,
    /// The arguments of a test.
    Test,
    /// Parameters.
    Parameters,
}

/// An open bracket with what is put off until it is closed.
struct Open {
    bracket: Bracket,
    /// The offset of the bracket of a subscript, until it is known to be a slice.
    subscript: Option<u32>,
    is_repeated: bool,
    argument: Option<u32>,
}

/// An automaton over the tokens of a tag.
///
/// Of a tag that the parser will refuse, it may insert anything.
struct Scan<'a, 's> {
    edits: &'a mut Edits,
    tag: &'a Tag<'s>,
    at: usize,
    guard: &'static str,
    bare: bool,
    brackets: Vec<Open>,
    /// Whether the operator before the operand is `*`.
    is_repeated: bool,
    /// The start of the argument of a test without parentheses.
    argument: Option<u32>,
}

impl<'a, 's> Scan<'a, 's> {
    fn run(mut self, mut state: State) {
        loop {
            let token = self.token(self.at);
            state = match state {
                State::Postfix { start, is_literal } => self.postfix(token, start, is_literal),
                State::Stage { is_literal } => self.stage(token, is_literal),
                _ if token.is_none() => return,
                State::Operand => self.operand(token),
                State::Operator => self.operator(token),
                State::Filter => self.filter(),
                State::Parameters => match token {
                    Some(Token::ParenOpen) => self.open(Bracket::Parameters),
                    _ => State::Operand,
                },
            };
        }
    }

    fn token(&self, at: usize) -> Option<&'a Token<'s>> {
        self.tag.get(at).map(|(token, _)| token)
    }

    fn previous(&self) -> Option<&'a Token<'s>> {
        self.token(self.at.checked_sub(1)?)
    }

    /// The offset of the current token, of which there is one.
    fn start(&self) -> u32 {
        self.tag[self.at].1.start_offset
    }

    fn skip(&mut self, n_tokens: usize, state: State) -> State {
        // An operand or a name may be cut off.
        self.at = self.tag.len().min(self.at + n_tokens);
        state
    }

    fn open(&mut self, bracket: Bracket) -> State {
        self.brackets.push(Open {
            bracket,
            subscript: None,
            is_repeated: std::mem::take(&mut self.is_repeated),
            argument: self.argument.take(),
        });
        self.skip(1, State::Operand)
    }

    fn close(&mut self) -> State {
        let Some(open) = self.brackets.pop() else {
            return self.skip(1, State::Operator);
        };
        (self.is_repeated, self.argument) = (open.is_repeated, open.argument);
        let state = match open.bracket {
            Bracket::Operand { start } => State::Postfix {
                start,
                is_literal: false,
            },
            Bracket::Filter => State::Stage { is_literal: false },
            Bracket::Test => State::Stage { is_literal: true },
            Bracket::Parameters => State::Operand,
        };
        self.skip(1, state)
    }

    fn operand(&mut self, token: Option<&Token>) -> State {
        match token {
            Some(Token::Ident("not")) => self.skip(1, State::Operand),
            Some(Token::Ident(_)) if matches!(self.token(self.at + 1), Some(Token::Assign)) => {
                self.skip(2, State::Operand)
            }
            Some(Token::Ident(_)) if self.is_parameter() => self.skip(1, State::Operator),
            Some(Token::ParenOpen | Token::BracketOpen | Token::BraceOpen) => {
                let start = self.start();
                self.open(Bracket::Operand { start })
            }
            Some(Token::ParenClose | Token::BracketClose | Token::BraceClose) => self.close(),
            Some(Token::Colon) => self.slice(),
            Some(
                token @ (Token::Ident(_)
                | Token::Str(_)
                | Token::String(_)
                | Token::Int(_)
                | Token::Int128(_)
                | Token::Float(_)),
            ) => {
                let constant = ["true", "True", "false", "False", "none", "None"];
                let span = self.tag[self.at].1;
                let is_literal = match token {
                    Token::Ident(name) => constant.contains(name),
                    _ => span.end_offset - span.start_offset <= MAX_LITERAL,
                };
                let start = span.start_offset;
                self.skip(1, State::Postfix { start, is_literal })
            }
            // A sign, the stars before arguments, a comma.
            _ => self.skip(1, State::Operand),
        }
    }

    fn is_parameter(&self) -> bool {
        let open = self.brackets.last();
        open.is_some_and(|open| open.bracket == Bracket::Parameters)
            && matches!(self.previous(), Some(Token::ParenOpen | Token::Comma))
    }

    fn postfix(&mut self, token: Option<&Token>, start: u32, is_literal: bool) -> State {
        let goes_on = State::Postfix {
            start,
            is_literal: false,
        };
        match token {
            Some(Token::Dot) => self.skip(2, goes_on),
            Some(Token::Str(_) | Token::String(_))
                if matches!(self.previous(), Some(Token::Str(_) | Token::String(_))) =>
            {
                self.skip(1, goes_on)
            }
            Some(Token::ParenOpen) => self.open(Bracket::Operand { start }),
            Some(Token::BracketOpen) => {
                let subscript = Some(self.start());
                let state = self.open(Bracket::Operand { start });
                if let Some(open) = self.brackets.last_mut() {
                    open.subscript = subscript;
                }
                state
            }
            _ => match self.argument.take() {
                None => State::Stage { is_literal },
                Some(argument) => {
                    if !is_literal {
                        self.edits.insert(argument, "(");
                        self.edits.insert(self.end(), VALUE);
                        self.edits.insert(self.end(), ")");
                    }
                    State::Stage { is_literal: true }
                }
            },
        }
    }

    /// Has the size of what is sliced checked: a slice of a string walks over its characters.
    fn slice(&mut self) -> State {
        if let Some(open) = self.brackets.last_mut()
            && let Bracket::Operand { start } = open.bracket
            && let Some(subscript) = open.subscript.take()
        {
            self.edits.insert(start, "(");
            self.edits.insert(subscript, VALUE);
            self.edits.insert(subscript, ")");
        }
        self.skip(1, State::Operand)
    }

    fn stage(&mut self, token: Option<&Token>, is_literal: bool) -> State {
        let is_free = |free: &[&str], name| match self.token(name) {
            Some(Token::Ident(name)) => free.contains(name),
            _ => false,
        };
        match token {
            Some(Token::Pipe) => {
                if !is_literal && !is_free(&FREE_FILTERS, self.at + 1) {
                    self.edits.insert(self.end(), VALUE);
                }
                self.skip(1, State::Filter)
            }
            Some(Token::Ident("is")) => {
                let mut name = self.at + 1;
                name += usize::from(matches!(self.token(name), Some(Token::Ident("not"))));
                if !is_literal && !is_free(&FREE_TESTS, name) {
                    self.edits.insert(self.end(), VALUE);
                }
                self.skip(name - self.at, State::Filter);
                self.skip_name();
                self.test()
            }
            _ => {
                let is_outermost = self.brackets.is_empty();
                let guard = if self.is_repeated || matches!(token, Some(Token::Mul)) {
                    SCALAR
                } else if is_outermost {
                    self.guard
                } else {
                    VALUE
                };
                if !(is_literal || self.bare && is_outermost) {
                    self.edits.insert(self.end(), guard);
                }
                State::Operator
            }
        }
    }

    /// The end of the last token, of which there is one.
    fn end(&self) -> u32 {
        self.tag[self.at - 1].1.end_offset
    }

    fn filter(&mut self) -> State {
        self.skip_name();
        match self.token(self.at) {
            Some(Token::ParenOpen) => self.open(Bracket::Filter),
            _ => State::Stage { is_literal: false },
        }
    }

    fn skip_name(&mut self) {
        self.skip(1, State::Filter);
        while let Some(Token::Dot) = self.token(self.at) {
            self.skip(2, State::Filter);
        }
    }

    /// The arguments of a test: in parentheses, or one without them.
    fn test(&mut self) -> State {
        match self.token(self.at) {
            Some(Token::ParenOpen) => self.open(Bracket::Test),
            None | Some(Token::Ident("and" | "or" | "else" | "is")) => {
                State::Stage { is_literal: true }
            }
            Some(
                Token::Ident(_)
                | Token::Str(_)
                | Token::String(_)
                | Token::Int(_)
                | Token::Int128(_)
                | Token::Float(_)
                | Token::Plus
                | Token::Minus
                | Token::BracketOpen
                | Token::BraceOpen,
            ) => {
                self.argument = Some(self.start());
                State::Operand
            }
            Some(_) => State::Stage { is_literal: true },
        }
    }

    fn operator(&mut self, token: Option<&Token>) -> State {
        match token {
            Some(Token::ParenClose | Token::BracketClose | Token::BraceClose) => self.close(),
            Some(Token::Ident("and" | "or" | "in" | "if" | "else")) => {
                self.is_repeated = false;
                self.skip(1, State::Operand)
            }
            // Of `not in`; of the end of a loop.
            Some(Token::Ident(_)) => self.skip(1, State::Operator),
            Some(Token::Colon) => {
                self.is_repeated = false;
                self.slice()
            }
            token => {
                self.is_repeated = matches!(token, Some(Token::Mul));
                self.skip(1, State::Operand)
            }
        }
    }
}
