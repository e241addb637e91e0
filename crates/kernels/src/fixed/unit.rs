//! The integer units of the processor.

use super::blocks::FEW;

/// A unit that multiplies bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
    Vnni,
    /// AMX in addition to the former (Sapphire Rapids and later), under Linux.
    Amx,
}

impl Unit {
    /// The unit of this processor that is fastest for `n_rows` rows; `None` if there is none, or no
    /// row.
    pub(crate) fn get(n_rows: usize) -> Option<Self> {
        match Self::best()? {
            _ if n_rows == 0 => None,
            Unit::Amx if n_rows > FEW => Some(Unit::Amx),
            _ => Some(Unit::Vnni),
        }
    }

    pub(super) fn best() -> Option<Self> {
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
