//! The types whose blocks of 256 have scales for groups in them: `dequantize_row_q*_K` of ggml.

use half::f16;

/// The values of a block.
pub(super) const BLOCK: usize = 256;

/// The values of blocks, each of which `block` reads.
pub(super) fn values<const N: usize>(
    bytes: &[u8],
    block: impl Fn(&[u8; N], &mut [f32; BLOCK]),
) -> Vec<f32> {
    let (blocks, _) = bytes.as_chunks::<N>();
    let mut values = vec![0.0; blocks.len() * BLOCK];
    let (out, _) = values.as_chunks_mut::<BLOCK>();
    for (bytes, out) in blocks.iter().zip(out) {
        block(bytes, out);
    }
    values
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

pub(super) fn q2(bytes: &[u8; 84], out: &mut [f32; BLOCK]) {
    let (scales, codes) = (&bytes[..16], &bytes[16..80]);
    let (d, d_min) = (half(bytes, 80), half(bytes, 82));
    for (at, out) in out.iter_mut().enumerate() {
        let (part, within) = (at / 128, at % 128);
        let code = codes[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let scale = scales[at / 16];
        let (d, minimum) = (d * f32::from(scale & 0x0F), d_min * f32::from(scale >> 4));
        *out = d * f32::from(code) - minimum;
    }
}

pub(super) fn q3(bytes: &[u8; 110], out: &mut [f32; BLOCK]) {
    let (high, codes, scales) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let d = half(bytes, 108);
    for (at, out) in out.iter_mut().enumerate() {
        let (part, within) = (at / 128, at % 128);
        let low = codes[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let third = high[at % 32] >> (at / 32) & 1;
        let code = f32::from(low | third << 2) - 4.0;
        let group = at / 16;
        let nibble = scales[group % 8] >> (4 * (group / 8)) & 0x0F;
        let top = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        let d = d * (f32::from(nibble | top << 4) - 32.0);
        *out = d * code;
    }
}

/// Scale and minimum of a group of 32, each of 6 bits.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            packed[group + 4] & 0x0F | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

pub(super) fn q4(bytes: &[u8; 144], out: &mut [f32; BLOCK]) {
    with_minimums(bytes, &bytes[16..], |_, _| 0, out);
}

pub(super) fn q5(bytes: &[u8; 176], out: &mut [f32; BLOCK]) {
    let high = &bytes[16..48];
    let fifth = |group: usize, at: usize| high[at] >> group & 1;
    with_minimums(bytes, &bytes[48..], fifth, out);
}

/// Groups of 32 with codes of 4 bits, two groups in 32 bytes, and perhaps a fifth bit.
fn with_minimums(
    head: &[u8],
    codes: &[u8],
    fifth: impl Fn(usize, usize) -> u8,
    out: &mut [f32; BLOCK],
) {
    let (d, d_min) = (half(head, 0), half(head, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&head[4..16], group);
        let (d, minimum) = (d * scale, d_min * minimum);
        let codes = &codes[32 * (group / 2)..][..32];
        for (at, (out, &pair)) in out.iter_mut().zip(codes).enumerate() {
            let code = pair >> (4 * (group % 2)) & 0x0F | fifth(group, at) << 4;
            *out = d * f32::from(code) - minimum;
        }
    }
}

pub(super) fn q6(bytes: &[u8; 210], out: &mut [f32; BLOCK]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half(bytes, 208);
    for (at, out) in out.iter_mut().enumerate() {
        let (part, within) = (at / 128, at % 128);
        let nibble = low[64 * part + within % 64] >> (4 * (within / 64)) & 0x0F;
        let top = high[32 * part + within % 32] >> (2 * (within / 32)) & 3;
        let code = f32::from(nibble | top << 4) - 32.0;
        let d = d * f32::from(scales[at / 16] as i8);
        *out = d * code;
    }
}
