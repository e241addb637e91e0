use burn::tensor::{DType, Tensor, activation};

/// The activation function of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `x Φ(x)`.
    Gelu,
    /// The approximation of `Gelu` by the hyperbolic tangent (`gelu_new`, `gelu_fast`,
    /// `gelu_pytorch_tanh`).
    GeluTanh,
    /// `x σ(1.702 x)`, an approximation of `Gelu` (`quick_gelu`).
    QuickGelu,
    /// `x σ(x)`.
    Silu,
}

impl Activation {
    /// The names in a `config.json`, as transformers has them; the first one is written.
    const NAMES: [(Self, &[&str]); 6] = [
        (Self::Relu, &["relu"]),
        (Self::Relu6, &["relu6"]),
        (Self::Gelu, &["gelu", "gelu_python"]),
        (
            Self::GeluTanh,
            &[
                "gelu_new",
                "gelu_pytorch_tanh",
                "gelu_fast",
                "gelu_accurate",
                "gelu_python_tanh",
            ],
        ),
        (Self::QuickGelu, &["quick_gelu"]),
        (Self::Silu, &["silu", "swish"]),
    ];

    /// The function of a name in a `config.json`.
    pub(crate) fn of_name(name: &str) -> Option<Self> {
        let mut all = Self::NAMES.iter();
        let found = all.find(|(_, names)| names.contains(&name))?;
        Some(found.0)
    }

    /// The name in a `config.json`.
    pub(crate) fn name(self) -> &'static str {
        let mut all = Self::NAMES.iter();
        let found = all.find(|(activation, _)| *activation == self);
        found.expect("all functions are listed").1[0]
    }

    /// All names in a `config.json`.
    pub(crate) fn names() -> String {
        let names = Self::NAMES.iter().flat_map(|(_, names)| names.iter());
        names.copied().collect::<Vec<_>>().join(", ")
    }

    /// Applies the function to each element.
    pub(crate) fn apply(self, x: Tensor<3>) -> Tensor<3> {
        // The functions have several steps, which round in `f32`.
        let dtype = x.dtype();
        let wide =
            |of: fn(Tensor<3>) -> Tensor<3>, x: Tensor<3>| of(x.cast(DType::F32)).cast(dtype);
        match self {
            Self::Relu => activation::relu(x),
            Self::Relu6 => activation::relu(x).clamp_max(6.0),
            Self::Gelu => wide(activation::gelu, x),
            Self::GeluTanh => wide(activation::gelu_approximate, x),
            Self::QuickGelu => wide(|x| x.clone() * activation::sigmoid(x * 1.702), x),
            Self::Silu => wide(activation::silu, x),
        }
    }

    /// The product of the function of `gate` and `up`.
    pub(crate) fn gate(self, gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Silu => kernels::silu_mul(gate, up),
            _ => self.apply(gate) * up,
        }
    }
}
