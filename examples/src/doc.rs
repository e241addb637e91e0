//! The documents of the project, whose Rust code is compiled as doctests.

macro_rules! documents {
    ($($name:ident $path:literal)*) => {
        $(
            #[cfg(doctest)]
            #[doc = include_str!($path)]
            struct $name;
        )*
    };
}

documents! {
    Readme "../../README.md"
    Contributing "../../CONTRIBUTING.md"
    Architecture "../../docs/architecture.md"
    Checks "../../docs/checks.md"
    Choosing "../../docs/choosing.md"
    Formats "../../docs/formats.md"
    Notation "../../docs/notation.md"
    Results "../../docs/results.md"
    Security "../../docs/security.md"
    Training "../../docs/training.md"
}
