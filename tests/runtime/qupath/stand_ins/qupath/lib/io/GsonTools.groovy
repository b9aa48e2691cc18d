package qupath.lib.io

import groovy.json.JsonSlurper

class GsonTools {

    static Gson getInstance() { new Gson() }

    /** As com.google.gson.Gson, whose numbers in a Map are all Double. */
    static class Gson {

        Object fromJson(String json, Class<?> classOfT) {
            assert classOfT == Map
            asDoubles(new JsonSlurper().parseText(json))
        }

        private Object asDoubles(Object value) {
            if (value instanceof Map) {
                return value.collectEntries { key, entry -> [(key): asDoubles(entry)] }
            }
            if (value instanceof List) {
                return value.collect { asDoubles(it) }
            }
            value instanceof Number ? value.doubleValue() : value
        }

    }

}
