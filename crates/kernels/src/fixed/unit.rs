//! The integer units of the processor.

use super::blocks::FEW;
use crate::Arithmetic;

/// A unit that multiplies bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
    Vnni,
    /// AMX in addition to the former (Sapphire Rapids and later), under Linux.
    Amx,
}

/// The least number of values in a block for which VNNI is no slower than floating point for many rows.
const LONG: usize = 128;

/// What rows are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// The codes of a packed weight, which are unsigned bytes, in blocks of so many values.
    Codes { block: usize },
    /// Values that are split into limbs, which VNNI does not multiply: they are signed.
    Values,
}

impl Unit {
    /// The unit for a product of `n_rows` rows; `None` for floating point.
    ///
    /// By the measurements in `docs/results.md`: VNNI computes many rows in `f32`'s precision as fast as
    /// floating point does (Zen 5), unless its sums are combined often.
    pub(crate) fn of(n_rows: usize, operand: Operand) -> Option<Self> {
        let best = Self::best().filter(|_| n_rows > 0)?;
        match (crate::arithmetic(), operand) {
            (Arithmetic::Float, _) => None,
            (Arithmetic::Fastest | Arithmetic::Amx, _) if best == Self::Amx && n_rows > FEW => {
                Some(Self::Amx)
            }
            (Arithmetic::Vnni, Operand::Codes { .. }) => Some(Self::Vnni),
            (_, Operand::Codes { block }) => (n_rows <= FEW || block >= LONG).then_some(Self::Vnni),
            (_, Operand::Values) => None,
        }
    }

    /// The best of the processor's units.
    pub(crate) fn best() -> Option<Self> {
        use std::sync::OnceLock;
        static UNIT: OnceLock<Option<Unit>> = OnceLock::new();
        *UNIT.get_or_init(|| {
            let vnni = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2");
            if !vnni {
                None
            } else if amx_permitted() {
                Some(Unit::Amx)
            } else {
                Some(Unit::Vnni)
            }
        })
    }
}

/// Whether the processor has AMX with bytes, and the system permits this process to use it.
fn amx_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        let (tiles, bytes) = (leaf.edx >> 24 & 1, leaf.edx >> 25 & 1);
        // SAFETY: the call requests a permission, and changes nothing if it is refused.
        tiles == 1
            && bytes == 1
            && unsafe {
                libc::syscall(
                    libc::SYS_arch_prctl,
                    ARCH_REQ_XCOMP_PERM,
                    XFEATURE_XTILEDATA,
                ) == 0
            }
    }
    #[cfg(not(target_os = "linux"))]
    false
}
