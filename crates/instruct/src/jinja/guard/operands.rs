//! The operands of a tag, behind which filters are inserted.

use minijinja::machinery::Token;

use super::{Edits, Tag};
use crate::jinja::{FORMAT, SCALAR, TEXT, VALUE};

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

/// The longest literal that need not be checked, in bytes.
const MAX_LITERAL: u32 = 256;

/// What comes next.
#[derive(Clone, Copy)]
pub(super) enum State {
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
    within: Within,
    argument: Option<u32>,
}

/// The operators that the next operand is within.
#[derive(Clone, Copy, Default)]
struct Within {
    /// The operator before the operand.
    operator: Operator,
    /// The operator before the string of a format, whose argument the operand is.
    format: Option<Operator>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Operator {
    /// None, or one that binds less tightly than `~`.
    #[default]
    Loose,
    Concat,
    Mul,
    /// Another that binds more tightly than `~`.
    Tight,
}

impl Operator {
    fn of(token: Option<&Token>) -> Self {
        match token {
            Some(Token::Tilde) => Self::Concat,
            Some(Token::Mul) => Self::Mul,
            Some(Token::Div | Token::FloorDiv | Token::Mod | Token::Pow) => Self::Tight,
            _ => Self::Loose,
        }
    }

    /// Whether what is between this operator and another is a whole operand of `~`.
    fn is_concat(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Concat, Self::Concat | Self::Loose) | (Self::Loose, Self::Concat)
        )
    }
}

/// An automaton over the tokens of a tag.
///
/// Of a tag that the parser will refuse, it may insert anything.
pub(super) struct Scan<'a, 's> {
    edits: &'a mut Edits,
    tag: &'a Tag<'s>,
    at: usize,
    guard: &'static str,
    bare: bool,
    brackets: Vec<Open>,
    within: Within,
    /// The start of the argument of a test without parentheses.
    argument: Option<u32>,
    /// Whether the operand has a test.
    is_tested: bool,
}

impl<'a, 's> Scan<'a, 's> {
    pub(super) fn new(
        edits: &'a mut Edits,
        tag: &'a Tag<'s>,
        guard: &'static str,
        bare: bool,
    ) -> Self {
        Self {
            edits,
            tag,
            at: 0,
            guard,
            bare,
            brackets: Vec::new(),
            within: Within::default(),
            argument: None,
            is_tested: false,
        }
    }

    pub(super) fn run(mut self, mut state: State) {
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
        self.is_tested = false;
        self.brackets.push(Open {
            bracket,
            subscript: None,
            within: std::mem::take(&mut self.within),
            argument: self.argument.take(),
        });
        self.skip(1, State::Operand)
    }

    fn close(&mut self) -> State {
        let Some(open) = self.brackets.pop() else {
            return self.skip(1, State::Operator);
        };
        (self.within, self.argument) = (open.within, open.argument);
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
                self.is_tested = true;
                self.skip(name - self.at, State::Filter);
                self.skip_name();
                self.test()
            }
            _ => self.end_operand(token, is_literal),
        }
    }

    /// Inserts what belongs behind an operand with its filters and tests.
    fn end_operand(&mut self, next: Option<&Token>, is_literal: bool) -> State {
        let (next, before) = (Operator::of(next), self.within.operator);
        let is_power = matches!(self.token(self.at), Some(Token::Pow));
        // The argument of a format ends here, whatever follows.
        let next_of_operand = match self.within.format {
            Some(_) if !is_power => Operator::Loose,
            _ => next,
        };
        let is_text = matches!(self.previous(), Some(Token::Str(_) | Token::String(_)));
        let is_outermost = self.brackets.is_empty() && self.within.format.is_none();
        let guard = if before == Operator::Mul || next_of_operand == Operator::Mul {
            Some(SCALAR)
        } else if before.is_concat(next_of_operand) {
            (!(is_literal && is_text)).then_some(TEXT)
        } else if is_outermost {
            Some(self.guard)
        } else {
            Some(VALUE)
        };
        let is_checked = !is_literal || guard == Some(TEXT);
        if let Some(guard) = guard
            && is_checked
            && !(self.bare && is_outermost)
        {
            self.edits.insert(self.end(), guard);
        }
        if !is_power {
            self.end_format(next);
        }
        let is_format = matches!(self.token(self.at), Some(Token::Mod)) && is_text;
        let before = self.within.operator;
        if is_format && !self.is_tested && matches!(before, Operator::Loose | Operator::Concat) {
            let span = self.tag[self.at].1;
            self.edits.replace(span, FORMAT);
            self.within = Within {
                operator: Operator::Loose,
                format: Some(before),
            };
            return self.skip(1, State::Operand);
        }
        State::Operator
    }

    /// Closes the argument of a format.
    fn end_format(&mut self, next: Operator) {
        if let Some(before) = self.within.format.take() {
            self.edits.insert(self.end(), ")");
            if before.is_concat(next) {
                self.edits.insert(self.end(), TEXT);
            } else {
                let is_outermost = self.brackets.is_empty();
                if !(self.bare && is_outermost) {
                    self.edits
                        .insert(self.end(), if is_outermost { self.guard } else { VALUE });
                }
            }
            self.within.operator = before;
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
        self.is_tested = false;
        match token {
            Some(Token::ParenClose | Token::BracketClose | Token::BraceClose) => self.close(),
            Some(Token::Ident("and" | "or" | "in" | "if" | "else")) => {
                self.within.operator = Operator::Loose;
                self.skip(1, State::Operand)
            }
            // Of `not in`; of the end of a loop.
            Some(Token::Ident(_)) => self.skip(1, State::Operator),
            Some(Token::Colon) => {
                self.within.operator = Operator::Loose;
                self.slice()
            }
            token => {
                self.within.operator = Operator::of(token);
                self.skip(1, State::Operand)
            }
        }
    }
}
