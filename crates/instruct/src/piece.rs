/// A part of a text whose tokens are all targets of the loss, or none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text of the part.
    pub text: String,
    /// Whether the model is trained to predict it.
    pub is_target: bool,
}
