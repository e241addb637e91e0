//! How the CPU computes products.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// How the CPU computes products with packed weights, and of dense matrices.
///
/// Floats and integers round differently, each as accurately as `f32` arithmetic with
/// [`Precision::Full`](crate::Precision::Full); VNNI and AMX give the same bits where both compute a product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[repr(u8)]
pub enum Arithmetic {
    /// The fastest for each product, by what was measured on processors with the same units.
    #[default]
    Fastest,
    /// Floating point.
    Float,
    /// The dot product of bytes of AVX-512 (VNNI) for the codes of packed weights, floating point for
    /// other products.
    Vnni,
    /// Intel's tiles (AMX), and VNNI for the few rows that would leave them mostly empty.
    Amx,
}

impl Arithmetic {
    const ALL: [Self; 4] = [Self::Fastest, Self::Float, Self::Vnni, Self::Amx];

    /// Whether the processor has the instructions.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Fastest | Self::Float => true,
            #[cfg(all(feature = "flex", target_arch = "x86_64"))]
            Self::Vnni => crate::fixed::Unit::best().is_some(),
            #[cfg(all(feature = "flex", target_arch = "x86_64"))]
            Self::Amx => crate::fixed::Unit::best() == Some(crate::fixed::Unit::Amx),
            #[cfg(not(all(feature = "flex", target_arch = "x86_64")))]
            Self::Vnni | Self::Amx => false,
        }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fastest => "the fastest arithmetic",
            Self::Float => "floating point",
            Self::Vnni => "AVX-512 VNNI",
            Self::Amx => "AMX",
        })
    }
}

/// The processor lacks the instructions of an [`Arithmetic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnsupportedArithmetic(pub Arithmetic);

impl fmt::Display for UnsupportedArithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(arithmetic) = self;
        write!(f, "the processor does not have {arithmetic}")
    }
}

impl Error for UnsupportedArithmetic {}

static CHOSEN: AtomicU8 = AtomicU8::new(Arithmetic::Fastest as u8);

/// Sets how the CPU computes products from now on, in the whole process: to measure the choices against
/// each other, or to have the bits of another processor, on which the same is set.
///
/// # Errors
/// If the processor lacks the instructions.
///
/// # Examples
/// ```
/// use kernels::Arithmetic;
///
/// kernels::set_arithmetic(Arithmetic::Float)?;
/// assert_eq!(kernels::arithmetic(), Arithmetic::Float);
/// # kernels::set_arithmetic(Arithmetic::Fastest)?;
/// # Ok::<(), kernels::UnsupportedArithmetic>(())
/// ```
pub fn set_arithmetic(arithmetic: Arithmetic) -> Result<(), UnsupportedArithmetic> {
    if !arithmetic.is_supported() {
        return Err(UnsupportedArithmetic(arithmetic));
    }
    CHOSEN.store(arithmetic as u8, Ordering::Relaxed);
    Ok(())
}

/// How the CPU computes products: [`Arithmetic::Fastest`], or what [`set_arithmetic`] set.
pub fn arithmetic() -> Arithmetic {
    let chosen = CHOSEN.load(Ordering::Relaxed);
    let mut all = Arithmetic::ALL.into_iter();
    all.find(|of| *of as u8 == chosen).unwrap_or_default()
}
