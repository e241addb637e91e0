use quant_core::Format;

/// An error of an initialization.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of a layer, a quantizer, a calibration or a setting.
    #[error(transparent)]
    Peft(#[from] peft::Error),
    /// A matrix whose singular value decomposition does not converge.
    #[error(
        "the singular value decomposition of layer `{path}` does not converge; its weight may be out of the range of f32"
    )]
    NoSvd {
        /// The layer.
        path: String,
    },
    /// A format without the uniform grid that a method learns.
    #[error(
        "the method learns a uniform grid, which {format} is not (layer `{path}`); quantize with `Rtn` or `Optq` with groups of consecutive inputs"
    )]
    NoRange {
        /// The layer.
        path: String,
        /// Its format.
        format: Format,
    },
    /// A method that needs all of a model, for a model of which one part is in memory at a time.
    #[error("{method} looks at all of a model at once; load the model, and call `loftq::init`")]
    WholeModel {
        /// The method.
        method: &'static str,
    },
    /// NaN or infinity in a layer.
    #[error("{what} of layer `{path}` is not finite")]
    NonFinite {
        /// The quantity.
        what: &'static str,
        /// The layer.
        path: String,
    },
}

impl Error {
    pub(crate) fn quant(path: &str) -> impl FnOnce(quant_core::Error) -> Self {
        |source| {
            let path = path.into();
            Self::Peft(peft::Error::Quant { path, source })
        }
    }
}

/// The error for a setting out of its range.
pub(crate) fn refused_setting(setting: &'static str, value: f64, expected: &'static str) -> Error {
    Error::Peft(peft::Error::Setting {
        setting,
        value: value.to_string(),
        expected,
    })
}

impl From<Error> for peft::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Peft(error) => error,
            error => Self::Method(Box::new(error)),
        }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
