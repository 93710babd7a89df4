"""What a plain CPU needs: a platform for SGLang and a prefill."""
